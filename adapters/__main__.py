"""`python -m adapters`: look into the store and change it, beside a running server or without one.

A running server sees every change at its next request. What is published here is checked, values included; a running
server proves it, golden prompts too, when it is first asked for.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from dotenv import dotenv_values

from adapters.adapter import BaseShape
from adapters.errors import AdapterError, AdapterRefused
from adapters.references import parse_composition
from adapters.registry import Entry, Kind, targets_in
from adapters.store import GRACE_SECONDS, AdapterStore

DEMO_MODEL = Path(__file__).resolve().parents[1] / "models" / "demo"
ORIGIN = "command line"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 refused or not found, 2 wrong usage."""
    args = _parser().parse_args(arguments)
    try:
        model = "demo" if args.model.resolve() == DEMO_MODEL else args.model.resolve().name
        reserved = frozenset({model, "base", "other"})  # as the server has it
        store = AdapterStore(args.store_dir, _shape(args.model), args.adapters_dir, reserved)
        answer = args.run(store, args)
    except (AdapterError, ValueError, OSError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer, indent=1, ensure_ascii=False) if args.json else _text(answer))
    return 0


def _list(store: AdapterStore, args: argparse.Namespace) -> list[dict[str, Any]]:
    return [_row(store, entry) for entry in store.entries()]


def _show(store: AdapterStore, args: argparse.Namespace) -> dict[str, Any]:
    entry = store.registry.entries.get(args.name)
    if entry is not None and entry.value is not None and entry.kind is Kind.ALIAS:
        row = _row(store, entry)
    else:
        found = store.get(args.name)
        entry = store.registry.entries[found.ref.name]
        row = _row(store, entry) | {"digest": found.ref.digest, "path": found.ref.path}
        row |= {"versions": list(entry.stack), "aliases": store.registry.aliases_of(entry.name)}
    return row | {"history": [asdict(event) for event in store.registry.history(entry.name)]}


def _variable(name: str) -> str | None:
    """From the environment, else from `.env`, as the server reads it."""
    return os.environ.get(name) or dotenv_values(".env", interpolate=False).get(name)


def _validate(store: AdapterStore, args: argparse.Namespace) -> dict[str, Any]:
    manifest = store.inspect(args.folder)
    return {
        "valid": True, "digest": manifest.ref.digest, "rank": manifest.rank, "targets": list(manifest.targets),
        "nbytes": manifest.nbytes, "base_model": manifest.base_model,
    }  # fmt: skip


def _publish(store: AdapterStore, args: argparse.Namespace) -> dict[str, Any]:
    name = args.name or args.folder.resolve().name
    if not args.folder.is_dir():
        raise ValueError(f"{str(args.folder)!r} is no folder; expected a PEFT adapter folder")
    return _row(store, store.publish(store.stage(name, args.folder), ORIGIN))


def _alias(store: AdapterStore, args: argparse.Namespace) -> dict[str, Any]:
    return _row(store, store.set_alias(args.name, parse_composition(args.targets), ORIGIN))


def _rollback(store: AdapterStore, args: argparse.Namespace) -> dict[str, Any]:
    return _row(store, store.rollback(args.name, ORIGIN))


def _remove(store: AdapterStore, args: argparse.Namespace) -> dict[str, Any]:
    store.remove(args.name, ORIGIN)
    return {"name": args.name, "removed": True}


def _gc(store: AdapterStore, args: argparse.Namespace) -> dict[str, Any]:
    return {"deleted": store.sweep(args.grace)}


def _row(store: AdapterStore, entry: Entry) -> dict[str, Any]:
    common: dict[str, Any] = {"name": entry.name, "kind": entry.kind.value}
    updated = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.updated))
    if entry.kind is Kind.ALIAS or entry.value is None:
        return common | {"targets": targets_in(entry.value or "[]"), "updated": updated}
    version = store.registry.versions[entry.value]
    common |= {"digest": entry.value, "rank": version.rank, "targets": list(version.targets), "nbytes": version.nbytes}
    return common | {"updated": updated, "folder_changed": store.changed(entry)}


def _text(answer: Any) -> str:
    """One line for each row of a list, `field: value` lines otherwise."""
    if isinstance(answer, list):
        rows = cast("list[dict[str, Any]]", answer)
        lines = [f"{r['name']:<32} {_short(r):<14} {_what(r)}" for r in rows]
        return "\n".join([f"{'NAME':<32} {'DIGEST':<14} WHAT", *lines])
    return "\n".join(f"{field}: {value}" for field, value in answer.items())


def _short(row: dict[str, Any]) -> str:
    return row.get("digest", "alias")[:12]


def _what(row: dict[str, Any]) -> str:
    if row["kind"] == "alias":
        return ", ".join(f"{reference} x {weight:g}" for reference, weight in row["targets"])
    changed = ", its folder has changed: publish it to serve that" if row["folder_changed"] else ""
    return f"rank {row['rank']}, {', '.join(row['targets'])}, {row['nbytes']:,} bytes{changed}"


def _shape(model: Path) -> BaseShape:
    """The sizes that a model's config.json gives. Raises AdapterRefused."""
    path = model / "config.json"
    try:
        raw = json.loads(path.read_bytes())
        n_embd, inner = int(raw["n_embd"]), raw.get("n_inner")
        return BaseShape(int(raw["n_layer"]), n_embd, 4 * n_embd if inner is None else int(inner))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterRefused(f"--model {model}: its config.json tells no sizes of a GPT-2 ({error!r})") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m adapters", description=__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--store-dir", type=Path, default=Path(_variable("CHORUS_STORE_DIR") or "var/store"), help="%(default)s"
    )
    shared.add_argument(
        "--model", type=Path, default=DEMO_MODEL, help="directory of the base that adapters have to fit; the demo base"
    )
    shared.add_argument("--adapters-dir", type=Path, help="also take in new folders from here, as the server does")
    shared.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., Any], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[shared], help=text, description=text)
        added.set_defaults(run=run)
        return added

    command("list", _list, "every adapter and alias")
    command("show", _show, "one of them, with its versions and history").add_argument("name")
    command("validate", _validate, "check a folder without publishing it").add_argument("folder", type=Path)
    publish = command("publish", _publish, "let a name mean what is in a folder now")
    publish.add_argument("folder", type=Path)
    publish.add_argument("--name", help="the folder's own if left out")
    alias = command("alias", _alias, "let a name, or adapter@tag, stand for others")
    alias.add_argument("name")
    alias.add_argument("targets", help="e.g. wilde@1f2e3d4c, or wilde:90,wilde@1f2e3d4c:10")
    command("rollback", _rollback, "give a name its value before").add_argument("name")
    command("remove", _remove, "take a name away").add_argument("name")
    gc = command("gc", _gc, "delete content that no name means any more")
    gc.add_argument("--grace", type=float, default=GRACE_SECONDS, help="seconds since it was last named; %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
