"""`python -m kernels.build`: compile the CPU kernels with the C++ compiler at hand.

Every instruction set is compiled; which one runs is chosen when the library is loaded. Without a compiler, or on a
processor other than x86-64 or 64-bit ARM, it says so and exits 0: the server then computes with torch alone.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "cpu"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
AVX512 = ["-DVL=16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
X86 = {
    "avx2": ["-DVL=8", "-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}
X86_NAMES, ARM_NAMES = ("x86_64", "amd64"), ("aarch64", "arm64")  # of platform.machine(), in lower case


def library() -> Path:
    """Where the library of these sources lies, or would lie."""
    content = b"".join(file.read_bytes() for file in sorted(SOURCES.glob("*.[ch]*"))) + Path(__file__).read_bytes()
    return SOURCES / "build" / f"libchorus-{hashlib.sha256(content).hexdigest()[:12]}.so"


def build(compiler: str) -> Path:
    """Compile and link. Raises subprocess.CalledProcessError with the compiler's words."""
    target = library()
    target.parent.mkdir(exist_ok=True)
    sets = {"plain": ["-DVL=4"]} | (X86 if platform.machine().lower() in X86_NAMES else {})
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        jobs = [
            ([compiler, *FLAGS, f"-DISA={name}", *flags, "-c", str(SOURCES / "kernels.cpp")], f"{scratch}/{name}.o")
            for name, flags in sets.items()
        ]
        jobs.append(([compiler, *FLAGS, "-c", str(SOURCES / "dispatch.cpp")], f"{scratch}/dispatch.o"))
        running = [(command, subprocess.Popen([*command, "-o", out], stderr=subprocess.PIPE)) for command, out in jobs]
        for command, process in running:
            _, errors = process.communicate()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)
        linked = f"{scratch}/linked.so"
        objects = [out for _, out in jobs]
        subprocess.run([compiler, "-shared", "-fopenmp", *objects, "-o", linked], check=True, capture_output=True)
        os.replace(linked, target)
    for old in target.parent.glob("libchorus-*.so"):
        if old != target:
            old.unlink()
    return target


def main() -> int:
    """The exit status: 0, also without a compiler or on another processor; 1 if compiling fails."""
    if (machine := platform.machine()).lower() not in X86_NAMES + ARM_NAMES:
        print(f"kernels: none for {machine}, only x86-64 and 64-bit ARM; the server will compute with torch alone")
        return 0
    if library().is_file():
        return 0
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("kernels: no C++ compiler found (g++ or clang++, or CXX); the server will compute with torch alone")
        return 0
    try:
        print(f"kernels: built {build(compiler)}")
    except (subprocess.CalledProcessError, OSError) as error:
        words = getattr(error, "stderr", None) or str(error).encode()
        print(
            f"kernels: {compiler} failed; the server will compute with torch alone\n{words.decode()}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
