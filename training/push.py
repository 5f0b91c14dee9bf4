"""`python -m training push ADAPTER REPO_ID`: sends an adapter's folder to a hub. Nothing else here ever sends anything.

Only files that an adapter is known to have go, and only from its folder itself; the token comes from the environment.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from adapters.golden import GOLDEN_FILE
from adapters.lora_config import CONFIG_FILE
from adapters.validation import WEIGHTS_FILE
from training.config import resolved_path
from training.errors import ConfigError, TrainingError

TOKEN = "HF_TOKEN"
SENT = (
    CONFIG_FILE, WEIGHTS_FILE, GOLDEN_FILE, "README.md", "report.json", "report.html", "recipe.yaml", "loss.png",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="python -m training push",
        description=f"Send an adapter's folder to a hub, with the token in {TOKEN}. HF_ENDPOINT names another hub.",
        epilog=f"Sent are, where they are there: {', '.join(SENT)}.",
    )
    flags.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder")
    flags.add_argument("repo", metavar="REPO_ID", help="where to: OWNER/NAME; it is made if it isn't there")
    flags.add_argument("--model", metavar="DIR|ID", help="the base (default: as recorded beside the adapter)")
    flags.add_argument("--private", action="store_true", help="make a new repository private")
    flags.add_argument("--revision", help="the branch; made if it isn't there (default: main)")
    flags.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")
    return flags


def main(argv: Sequence[str]) -> None:
    """Check the adapter, show what goes, send it. Raises TrainingError, OSError."""
    flags = parser().parse_args(argv)
    token = os.environ.get(TOKEN, "").strip()
    if not (token or flags.dry_run):
        raise ConfigError(f"{TOKEN} is not set: put a token with write access into this environment variable")

    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from training import made  # imported late: it imports torch
    from training.base import open_base

    try:
        validate_repo_id(flags.repo)
    except HFValidationError as error:
        raise ConfigError(f"REPO_ID {flags.repo!r}: {error}") from error
    (adapter,) = made.find([flags.adapter])
    digest = adapter.digest(open_base(resolved_path(flags.model or adapter.model)))
    names = files_of(adapter.folder)
    others = sorted(file.name for file in adapter.folder.iterdir() if file.name not in names)
    print(f"{adapter.name} ({digest[:12]}) to {flags.repo}{f', branch {flags.revision}' if flags.revision else ''}:")
    for name in names:
        print(f"  {name:28} {(adapter.folder / name).stat().st_size:12,} bytes")
    if others:
        print(f"  stays here: {', '.join(others)}")
    if not flags.dry_run:
        url = _send(adapter.folder, names, flags.repo, token, flags.private, flags.revision, digest)
        print(f"sent: {url}", flush=True)


def files_of(folder: Path) -> list[str]:
    """Those of SENT that are there. Raises ConfigError for a link: it may lead out of the folder."""
    names = [name for name in SENT if (folder / name).is_file() or (folder / name).is_symlink()]
    for name in names:
        if (folder / name).is_symlink():
            raise ConfigError(f"{folder / name} is a link; only files of the folder itself are sent: put a copy there")
    return names


def _send(
    folder: Path, names: Sequence[str], repo: str, token: str, private: bool, revision: str | None, digest: str
) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)  # None: as the owner has it
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=list(names), revision=revision,
            commit_message=f"Adapter {digest[:12]}",
        )  # fmt: skip
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        ways = {
            401: f"the hub doesn't take the token in {TOKEN}: give one that is valid",
            403: f"the token in {TOKEN} may not write there: give one with write access to {repo.split('/')[0]}",
        }
        said = " ".join((error.server_message or str(error)).split())
        raise TrainingError(f"push to {repo}: {ways.get(status or 0, f'the hub answers {status}')} ({said})") from error
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise TrainingError(
            f"push to {repo}: {api.endpoint} can't be reached, or doesn't answer as a hub does ({said}); "
            "try again later, or name another hub with HF_ENDPOINT"
        ) from error
    return str(done.commit_url)
