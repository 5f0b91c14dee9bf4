"""`make llamacpp`: build llama.cpp's `llama-batched-bench` from the source package of llama-cpp-python.

pip downloads that one package (and, to read its metadata, the package that builds it, which isn't kept); CMake compiles
the one program, for this processor and as llama.cpp does by default. The program and the package's `gguf`, which writes
models, are all that stays.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

BUILD = Path(__file__).resolve().parent / "build"
TOOL = "llama-batched-bench"
VERSION = "0.3.36"  # of llama-cpp-python; its llama.cpp calls itself 0.5.0-dev
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SOURCE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp"
DOWNLOAD = ["download", "-q", "--disable-pip-version-check", "--no-deps", "--no-binary", "llama-cpp-python"]
CMAKE = [
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DGGML_CCACHE=OFF",
]  # fmt: skip


class BuildError(Exception):
    """The tool can't be built; the message says what is missing or wrong."""


def missing_programs() -> list[str]:
    """What compiling needs and this machine lacks."""
    absent = [] if shutil.which("cmake") else ["cmake"]
    if not (shutil.which("make") or shutil.which("ninja")):
        absent.append("make")
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        absent.append("g++")
    return absent


def download(folder: Path) -> Path:
    """The source package, in `folder`. Raises BuildError, subprocess.CalledProcessError."""
    command = [sys.executable, "-m", "pip", *DOWNLOAD, "-d", str(folder), f"llama-cpp-python=={VERSION}"]
    subprocess.run(command, check=True)
    file = folder / f"llama_cpp_python-{VERSION}.tar.gz"
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256:
        raise BuildError(f"{file.name} has SHA-256 {found}, expected {SHA256}: not the package that was pinned")
    return file


def build(into: Path) -> None:
    """Put the tool and `gguf` into the folder `into`. Raises BuildError, subprocess.CalledProcessError."""
    if absent := missing_programs():
        raise BuildError(f"not found: {', '.join(absent)}; install them (Debian: apt install cmake g++ make)")
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        folder = Path(scratch)
        with tarfile.open(download(folder)) as package:
            own = [member for member in package.getmembers() if member.name.startswith(f"{SOURCE}/")]
            package.extractall(folder, own, filter="data")
        objects = folder / "objects"
        subprocess.run(["cmake", "-S", str(folder / SOURCE), "-B", str(objects), *CMAKE], check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(objects), "--target", TOOL, "-j", jobs], check=True)
        shutil.copytree(folder / SOURCE / "gguf-py" / "gguf", into / "gguf", dirs_exist_ok=True)
        os.replace(objects / "bin" / TOOL, into / TOOL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=BUILD, help="the folder that gets the tool")
    into: Path = parser.parse_args().into
    if (into / TOOL).is_file():
        print(f"{into / TOOL} is there already; delete it to build it anew")
        return 0
    try:
        build(into)
    except (BuildError, subprocess.CalledProcessError, OSError) as error:
        print(f"llamacpp: {error}", file=sys.stderr)
        return 1
    print(f"llamacpp: built {into / TOOL}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
