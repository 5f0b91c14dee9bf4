"""`python -m training`: train one adapter, measure it beside the base, write its folder; and the commands beside it."""

import importlib
import sys
from collections.abc import Sequence

from training.cli import parse_args
from training.errors import GateFailed, TrainingError
from training.launcher import INTERRUPTED, speaking_once

# Command -> the module whose `main(argv)` it is. Imported late: flags are checked before torch takes its seconds.
COMMANDS = {
    "choir": "training.choir",
    "compare": "training.compare",
    "evaluate": "training.evaluate_command",
    "export": "training.export",
    "push": "training.push",
    "search": "training.search",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 2 for what the user can mend, with one line that says what; 3 for an adapter that failed its
    gate; 130 if interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return speaking_once(lambda: _main(arguments))


def _main(arguments: list[str]) -> int:
    try:
        if arguments and arguments[0] in COMMANDS:
            importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
        else:
            config = parse_args(arguments)
            from training.run import run

            run(config)
    except GateFailed as error:
        print(f"gate: {error}", file=sys.stderr)
        return 3
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or '--output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        trains = not arguments or arguments[0] not in COMMANDS or arguments[0] == "choir"
        way_on = "; the same command with --resume goes on from the last checkpoint" if trains else ""
        print(f"\ninterrupted{way_on}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
