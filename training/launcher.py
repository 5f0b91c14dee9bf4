"""What `torchrun` or `accelerate launch` tells a process that it starts, by the environment. It imports no torch."""

import contextlib
import io
import os
import time
from collections.abc import Callable

HEARD_SECONDS = 5.0  # a launcher ends the others as soon as one ends; in that time the first has said why
INTERRUPTED = 130


def launched() -> tuple[int, int]:
    """This process's rank, and how many there are: (0, 1) without a launcher."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), world) if world > 1 else (0, 1)


def speaking_once(work: Callable[[], int]) -> int:
    """The exit status of `work`, of which only the first process prints anything; a traceback is printed by any."""
    if launched()[0] == 0:
        return work()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = work()
        except SystemExit as stopped:  # argparse's, for a flag that there isn't
            status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    if status not in (0, INTERRUPTED):
        time.sleep(HEARD_SECONDS)
    return status
