"""Environments for clients: of their own where their pins clash with ours, or over ours, with what they need beside."""

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
OVER_OURS = ("lm-eval", "guidellm")
"""Environments that find torch, transformers and the like in ours."""
CACHE = Path(os.environ.get("CHORUS_CLIENTS", HERE.parents[1] / "build" / "clients"))


def python_of(name: str) -> Path:
    """The interpreter of requirements/NAME.txt's environment, made where there is none for what it says now.

    Raises subprocess.CalledProcessError with pip's words in the test's output.
    """
    requirements = HERE / "requirements" / f"{name}.txt"
    folder = CACHE / f"{name}-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--disable-pip-version-check"]
        quick = ["-q", "--no-deps", "--no-compile"]  # what is never imported need not be compiled
        subprocess.run([*pip, *quick, *os.environ.get("PIP_ARGS", "").split(), "-r", str(requirements)], check=True)
        if name in OVER_OURS:
            _site_packages(folder).joinpath("ours.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        (folder / "complete").touch()
    return python


def _site_packages(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def run(name: str, script: str, *arguments: str, env: dict[str, str] | None = None, seconds: float = 120) -> str:
    """What scripts/SCRIPT prints, run in the environment NAME. A failure's output is in the exception."""
    done = subprocess.run(
        [str(python_of(name)), str(HERE / "scripts" / script), *arguments],
        capture_output=True, text=True, timeout=seconds, cwd=HERE, env={**os.environ, **(env or {})},
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(f"{script} in {name} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout
