"""For the GPU's kernels."""

from contextlib import suppress

with suppress(ImportError):  # without triton they are skipped
    from tests.interpreter import quicken

    quicken()
