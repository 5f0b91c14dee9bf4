"""Adapters over HTTP: listing, publishing, aliases, rollback, removal; vLLM's two routes for the same.

Reading needs the inference key, everything else the admin key (gate.py). A new version is stored, checked, and proved
on the engine before a name means it.
"""

import asyncio
import contextvars
import os
import shutil
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Query
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from adapters.aliases import check_alias
from adapters.archive import unpack
from adapters.errors import AdapterError, AdapterExists, AdapterRefused
from adapters.registry import Kind
from adapters.store import AdapterStore, Found
from server.api.adapter_records import RecordWriter, facts
from server.api.errors import ApiError
from server.api.gate import MAX_BODY_BYTES
from server.api.processes import OneAtATime
from server.api.schemas_lifecycle import AliasRequest, LoadRequest, UnloadRequest, ValidateRequest
from server.api.spec import ChorusSpec

T = TypeVar("T")
ORIGIN = "HTTP"
DEFAULT_WAIT_SECONDS = 60.0
POLL_SECONDS = 0.1
WhenBusy = Annotated[Literal["wait", "refuse"], Query(description="Wait for its requests, or answer 409.")]
Timeout = Annotated[float, Query(gt=0, le=3600, description="Seconds to wait for its requests.")]


class LifecycleRoutes:
    """The handlers over one spec."""

    def __init__(self, spec: ChorusSpec) -> None:
        self._spec = spec
        self._records = RecordWriter(spec)
        self._fetchers = ThreadPoolExecutor(4, "fetch")  # of their own: sources that stall hold up each other alone
        self._publishing = OneAtATime()  # each takes disk, hashing and a place on the device

    def register(self) -> None:
        """Add the routes."""
        for method, path, handler in (
            ("GET", "/v1/adapters", self.list),
            ("POST", "/v1/adapters:validate", self.validate),
            ("GET", "/v1/adapters/{name}", self.show),
            ("PUT", "/v1/adapters/{name}", self.upload),
            ("DELETE", "/v1/adapters/{name}", self.delete),
            ("POST", "/v1/adapters/{name}/rollback", self.rollback),
            ("PUT", "/v1/aliases/{name}", self.put_alias),
            ("DELETE", "/v1/aliases/{name}", self.delete_alias),
            ("POST", "/v1/aliases/{name}/rollback", self.rollback_alias),
            ("POST", "/v1/load_lora_adapter", self.load),
            ("POST", "/v1/unload_lora_adapter", self.unload),
        ):
            self._spec.route(method, path, handler)

    async def list(
        self,
        limit: Annotated[int, Query(ge=1, le=1000, description="Records of a page.")] = 100,
        after: Annotated[str, Query(max_length=128, description="The last name of the page before.")] = "",
    ) -> dict[str, Any]:
        """Adapters and aliases by name, a page at a time, and the folders that were refused."""
        return await asyncio.to_thread(self._records.page, after, limit, await self._spec.in_flight.counts())

    async def show(self, name: str) -> dict[str, Any]:
        """An adapter, an alias or a version (`name@digest`): what it is, where it stands, its history and report."""
        return await _call("name", self._records.show, name, await self._spec.in_flight.counts())

    async def upload(self, name: str, http: HttpRequest) -> dict[str, Any]:
        """Publish a version: the body is a tar, tar.gz or zip of a PEFT adapter folder."""
        self._check_name(name, "name")
        async with self._received(http) as (folder, ignored):
            return await self._publish(name, folder, "upload") | {"ignored": ignored}

    async def validate(self, http: HttpRequest) -> dict[str, Any]:
        """Check without publishing: an archive as for PUT, or JSON with the `path` of a folder."""
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
            async with self._fetched(_parsed(await _small_body(http)).path, "path") as (folder, _):
                return {"valid": True, **facts(await _call("path", self._store.inspect, folder)), "ignored": []}
        async with self._received(http) as (folder, ignored):
            return {"valid": True, **facts(await _call("body", self._store.inspect, folder)), "ignored": ignored}

    async def delete(
        self, name: str, when_busy: WhenBusy = "wait", timeout: Timeout = DEFAULT_WAIT_SECONDS
    ) -> JSONResponse:
        """Take a name away. What runs finishes; whoever asks now gets 404."""
        left = await self._remove(name, "name", when_busy, timeout)
        return JSONResponse({"name": name, "removed": True, "in_flight": left}, 202 if left else 200)

    async def delete_alias(self, name: str) -> dict[str, Any]:
        """Take an alias away."""
        await _call("name", self._store.remove, name, ORIGIN, Kind.ALIAS)
        return {"name": name, "removed": True}

    async def rollback(self, name: str) -> dict[str, Any]:
        """Give an adapter the version before."""
        async with self._publishing.held():
            before = await _call("name", self._store.before, name)
            if before is not None:
                await self._prove(before, "name")
            await _call("name", self._store.rollback, name, ORIGIN, Kind.ADAPTER)
            return await self.show(name)

    async def rollback_alias(self, name: str) -> dict[str, Any]:
        """Give an alias the targets before."""
        await _call("name", self._store.rollback, name, ORIGIN, Kind.ALIAS)
        return await self.show(name)

    async def put_alias(self, name: str, body: AliasRequest) -> dict[str, Any]:
        """Let a name, or `adapter@tag`, stand for an adapter, or for several by weight."""
        self._check_name(name, "name", alias=True)
        targets = [(target.ref, target.weight) for target in body.targets]
        await _call("targets", self._store.set_alias, name, targets, ORIGIN)
        return await self.show(name)

    async def load(self, body: LoadRequest) -> Response:
        """vLLM's: publish `lora_path`, a folder inside the adapter roots or a source that is allowed."""
        name, path = _required(body.lora_name, "lora_name"), _required(body.lora_path, "lora_path")
        self._check_name(name, "lora_name")
        taken = ApiError(
            400, "validation", f"`lora_name` {name!r} is loaded already; set `load_inplace` true to replace it",
            param="lora_name",
        )  # fmt: skip
        if not body.load_inplace and self._store.has(name):
            raise taken
        async with self._fetched(path, "lora_path") as (folder, origin):
            try:
                await self._publish(name, folder, origin, new=not body.load_inplace)
            except AdapterExists:  # meanwhile
                raise taken from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, body: UnloadRequest) -> Response:
        """vLLM's: take a name away."""
        name = _required(body.lora_name, "lora_name")
        left = await self._remove(
            name, "lora_name", body.when_busy or "wait", body.timeout or DEFAULT_WAIT_SECONDS
        )  # fmt: skip
        still = f" {left} requests that run still use it." if left else ""
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.{still}", 202 if left else 200)

    @property
    def _max_bytes(self) -> int:
        return int(self._spec.state.settings.max_adapter_bytes)

    @property
    def _store(self) -> AdapterStore:
        return self._spec.state.store

    def _check_name(self, name: str, field: str, *, alias: bool = False) -> None:
        """Raises 422 ApiError for a name that no adapter, or no alias, may have."""
        try:
            self._store.check_name(check_alias(name).name if alias else name)
        except (AdapterRefused, ValueError) as error:
            raise ApiError(422, "validation", f"`{field}`: {error}", param=field) from None

    @asynccontextmanager
    async def _received(self, http: HttpRequest) -> AsyncGenerator[tuple[Path, "list[str]"]]:
        """The adapter folder that a body holds, and the names of what it holds beside."""
        with self._store.objects.staging() as staging:
            try:
                with (staging / "archive").open("wb") as file:
                    async for chunk in http.stream():
                        await asyncio.to_thread(file.write, chunk)
            except ClientDisconnect:
                raise ApiError(499, "client_closed", "the client closed the connection") from None
            except OSError as error:
                raise ApiError.unavailable(f"the upload can't be stored: {error.strerror}") from None
            unpacked = await _call("body", unpack, staging / "archive", staging / "unpacked", self._max_bytes)
            yield unpacked.folder, list(unpacked.ignored)

    @asynccontextmanager
    async def _fetched(self, source: str, field: str) -> AsyncGenerator[tuple[Path, str]]:
        """The adapter folder that a path or address names, and where it came from."""
        downloads, fetch = self._store.objects.downloads(source), self._spec.state.sources.fetch
        if "://" not in source:  # read where it lies, by as many as like
            fetched = await _call(field, fetch, source, downloads)
            yield fetched.folder, fetched.origin
            return
        async with self._turn(source):
            fetched = await _call(field, fetch, source, downloads, pool=self._fetchers)
            yield fetched.folder, fetched.origin
            await asyncio.to_thread(shutil.rmtree, downloads, ignore_errors=True)  # what failed goes on the next time

    @asynccontextmanager
    async def _turn(self, source: str) -> AsyncGenerator[None]:
        """Two fetches of one source, by whichever processes, would write the same files."""
        # Not in a thread: if this task were cancelled meanwhile, nobody would close what the thread opens.
        while (lock := self._store.objects.try_downloading(source)) is None:
            await asyncio.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            os.close(lock)

    async def _publish(self, name: str, folder: Path, origin: str, *, new: bool = False) -> dict[str, Any]:
        """Raises AdapterExists, or ApiError."""
        async with self._publishing.held():
            found = await _call("name", self._store.stage, name, folder)
            await self._prove(found, "name")
            await _call("name", partial(self._store.publish, found, origin, new=new))
            return await self.show(name)

    async def _prove(self, found: Found, field: str) -> None:
        """Let the engine load a version, check its values and replay its golden prompts. Raises ApiError."""
        engine = self._spec.engine
        if engine.residency.get(found.ref.digest, ("", None))[0] == "failed":
            engine.forget(found.ref.digest)  # now, not when its back-off ends
        error = await self._spec.prove(found.ref)
        if error is not None:
            error.param = field
            raise error

    async def _remove(self, name: str, field: str, when_busy: str, seconds: float) -> int:
        """Requests that still use it after `seconds`."""
        in_flight = self._spec.in_flight
        if when_busy == "refuse" and (count := (await in_flight.counts())[name]):
            problem = f"{count} requests in flight use {name!r}; try again, or wait for them with when_busy=wait"
            raise ApiError(409, "conflict", problem, {"x-should-retry": "false"}, param=field)
        entry = await _call(field, self._store.remove, name, ORIGIN, Kind.ADAPTER)
        left = await in_flight.idle(name, seconds)
        for digest in set(entry.stack) - self._store.registry.named():
            self._spec.engine.forget(digest)
        return left


async def _call(field: str, work: Callable[..., T], *arguments: Any, pool: Executor | None = None) -> T:
    """Run in a thread (of `pool`, if given); the errors of adapters and of values become answers about `field`."""
    try:
        bound = partial(contextvars.copy_context().run, work, *arguments)  # log lines keep their request's id
        return await asyncio.get_running_loop().run_in_executor(pool, bound)
    except AdapterExists:
        raise
    except AdapterError as error:
        raise ApiError.of_adapter(error, field) from None
    except ValueError as error:
        raise ApiError.invalid(field, str(error)) from None


async def _small_body(http: HttpRequest) -> bytes:
    """JSON where an archive may be, too: BodyLimit lets those through."""
    body = b""
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, "validation", f"the JSON body is larger than {MAX_BODY_BYTES:,} bytes")
    return body


def _required(value: str | None, field: str) -> str:
    if not value:
        raise ApiError(400, "validation", f"`{field}` is missing", param=field)
    return value


def _parsed(body: bytes) -> ValidateRequest:
    try:
        return ValidateRequest.model_validate_json(body)
    except ValidationError as error:
        problems = [(".".join(map(str, p["loc"])) or "body", p["msg"]) for p in error.errors()]
        told = "; ".join(f"`{where}`: {message}" for where, message in problems)
        raise ApiError(422, "validation", told, param=problems[0][0]) from None
