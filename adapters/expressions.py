"""Regular expressions that nobody vouches for: compiled only if matching a module's name with them stays cheap.

`re` backtracks and can't be interrupted, so the work is bounded from the expression's text, before it is used.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from adapters.errors import AdapterRefused
from adapters.tensorfile import shown

MAX_CHARS = 256
MAX_EXPRESSIONS = 1024
"""In one field; more than any GPT-2 has projections."""
MAX_STEPS = 400_000
"""For all expressions of a field together and one name; some 15 ms."""
MAX_ALL_CHARS = 32 << 10
_NAME_CHARS = 30
_NO_SYNTAX = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?", re.S)  # escapes, classes, and how groups begin
# What stands in a comment would be taken for groups and classes here, or hide them.
_COMMENTS = re.compile(r"\(\?(#|[aiLmsu-]*x)")

_Paths = Counter[int]


def compile_all(patterns: Sequence[str], field: str, before: str = "", after: str = "") -> list[re.Pattern[str]]:
    """`before` + pattern + `after` for each; the patterns are checked, what is around them is trusted.

    Raises AdapterRefused naming `field` and the expression: too long, a repeated group, too many ways to match.
    """
    chars = sum(map(len, patterns))
    if len(patterns) > MAX_EXPRESSIONS or chars > MAX_ALL_CHARS:
        raise AdapterRefused(
            f"{field} holds {len(patterns):,} expressions of {chars:,} characters; at most {MAX_EXPRESSIONS:,} of "
            f"{MAX_ALL_CHARS:,} are taken"
        )
    compiled: list[re.Pattern[str]] = []
    steps = 0
    for pattern in patterns:
        steps += _steps(pattern) if len(pattern) <= MAX_CHARS else MAX_STEPS + 1
        if steps > MAX_STEPS:
            raise AdapterRefused(
                f"{field} holds the expression {shown(pattern)}: longer than {MAX_CHARS} characters, with so many "
                f"repetitions and alternatives that matching may take long, with a comment, or with a repeated group"
            )
        try:
            compiled.append(re.compile(f"{before}{pattern}{after}"))
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterRefused(f"{field} holds {shown(pattern)}, not a regular expression: {error}") from None
    return compiled


def _steps(pattern: str) -> int:
    """A bound on the ways in which a backtracking matcher may walk a name.

    A path takes one alternative of each group; each repetition on it ends at the same or a later place in the name.
    """
    bare = _NO_SYNTAX.sub(lambda found: "(" if found[0] == "(?" else "_", pattern)
    if re.search(r"\)[*+{]", bare) or _COMMENTS.search(pattern):
        return MAX_STEPS + 1
    # Paths by their number of repetitions: of the alternatives before, and of the one being read; by open groups.
    before, here = [_Paths()], [_Paths({0: 1})]
    for token in re.findall(r"[*+?{]+|[(|)]", bare):
        if token == "(":
            before.append(_Paths())
            here.append(_Paths({0: 1}))
        elif token == "|":
            before[-1] += here[-1]
            here[-1] = _Paths({0: 1})
        elif token != ")":
            here[-1] = _then(here[-1], _Paths({1: 1}))
        elif len(here) > 1:
            group = before.pop() + here.pop()
            here[-1] = _then(here[-1], group)
    paths = sum(before + here, _Paths())
    return sum(number * math.comb(_NAME_CHARS + repeats, repeats) for repeats, number in paths.items())


def _then(first: _Paths, second: _Paths) -> _Paths:
    both = _Paths()
    for repeats, number in first.items():
        for more, others in second.items():
            both[repeats + more] += number * others
    return both
