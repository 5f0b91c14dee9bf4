"""Adapters as `GET /v1/adapters` shows them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.adapter import AdapterManifest
from adapters.errors import AdapterError
from adapters.lora_config import CONFIG_FILE
from adapters.objects import MAX_SIDECAR_BYTES
from adapters.registry import Entry, Kind, targets_in
from adapters.tensorfile import open_regular, parse_json
from server.api.spec import ChorusSpec

REPORT_FILE = "report.json"


def facts(manifest: AdapterManifest) -> dict[str, Any]:
    """What a check without publishing tells."""
    return {
        "digest": manifest.ref.digest,
        "rank": manifest.rank,
        "targets": list(manifest.targets),
        "nbytes": manifest.nbytes,
        "base_model": manifest.base_model,
    }


class RecordWriter:
    """Reads the store and what the worker has told; its methods read files."""

    def __init__(self, spec: ChorusSpec) -> None:
        self._spec = spec

    def page(self, after: str, limit: int, in_flight: Mapping[str, int]) -> dict[str, Any]:
        """The records of `limit` names after `after`; `in_flight`: requests by name."""
        entries = [entry for entry in self._spec.state.store.entries() if entry.name > after]
        page, more = entries[:limit], len(entries) > limit
        return {
            "object": "list",
            "data": [self._record(entry, in_flight) for entry in page],
            "has_more": more,
            "next": page[-1].name if more else None,
            "refused": [] if after else self._refused(),
        }

    def show(self, name: str, in_flight: Mapping[str, int]) -> dict[str, Any]:
        """Everything about one name or version. Raises AdapterError."""
        store = self._spec.state.store
        store.registry.refresh()
        entry = store.registry.entries.get(name)
        if entry is None or entry.value is None or entry.kind is Kind.ADAPTER:
            meant = store.look_up(name)
            if meant is None:
                ref = store.get(name).ref  # a folder, or an error
                meant = ref.name, ref.digest
            entry = store.registry.entries[meant[0]]
            record = self._record(entry, in_flight, meant[1]) | self._files(store.objects.path(meant[1]))
        else:
            record = self._record(entry, in_flight)
        history = store.registry.history(entry.name)
        return record | {
            "history": [
                {"action": e.action, "value": _value(entry.kind, e.value), "origin": e.origin, "at": e.at}
                for e in history
            ],
            "aliases": store.registry.aliases_of(entry.name) if entry.kind is Kind.ADAPTER else [],
        }

    def _record(self, entry: Entry, in_flight: Mapping[str, int], digest: str | None = None) -> dict[str, Any]:
        """Of the entry's current version if `digest` is None."""
        common = {"name": entry.name, "kind": entry.kind.value, "created": entry.created, "updated": entry.updated}
        if entry.kind is Kind.ALIAS:
            return common | {"targets": _value(entry.kind, entry.value or "[]")}
        digest = digest or entry.value or ""
        version = self._spec.state.store.registry.versions[digest]
        state, reason = self._state(entry.name, digest)
        return common | {
            "digest": digest,
            "versions": list(entry.stack),
            "rank": version.rank,
            "targets": list(version.targets),
            "nbytes": version.nbytes,
            "base_model": version.base_model,
            "state": state,
            "reason": reason,
            "in_flight": in_flight.get(entry.name, 0),
            "folder_changed": self._spec.state.store.changed(entry),
        }

    def _state(self, name: str, digest: str) -> tuple[str, str | None]:
        """Where a version stands: absent, loading, ready, refused or failed, and why."""
        try:
            self._spec.state.store.get(f"{name}@{digest}")
        except AdapterError as error:
            return "refused", str(error)
        link = self._spec.link
        return ("absent", None) if link is None else link.residency.get(digest, ("absent", None))

    def _files(self, folder: Path) -> dict[str, Any]:
        config: dict[str, Any] = _json(folder / CONFIG_FILE) or {}
        return {
            "alpha": config.get("lora_alpha"),
            "report": _json(folder / REPORT_FILE),
            "golden": (folder / "golden.json").is_file(),
        }

    def _refused(self) -> list[dict[str, str]]:
        return [{"name": name, "reason": why} for name, why in self._spec.state.store.refusals().items()]


def _value(kind: Kind, value: str) -> Any:
    if kind is Kind.ADAPTER or not value:
        return value or None
    return [{"ref": reference, "weight": weight} for reference, weight in targets_in(value)]


def _json(path: Path) -> Any:
    """What a sidecar holds; None if it is missing or no plain JSON: it decides nothing."""
    try:
        with open_regular(path, MAX_SIDECAR_BYTES) as file:
            return parse_json(file.read(), path.name)
    except (OSError, AdapterError):
        return None
