"""Regular expressions that nobody vouches for: compiled only if matching a module's name with them stays cheap.

`re` backtracks and can't be interrupted, so the work is bounded from the expression's text, before it is used.
"""

import math
import re
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
_COMMENTS = re.compile(
    r"\(\?(#|[aiLmsu-]*x)"
)  # what stands in them would be taken for groups and classes, or hide them


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

    Without repeated groups: each repetition ends at some later place in the name, each group takes one alternative.
    """
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]|\(\?", lambda found: "(" if found[0] == "(?" else "_", pattern, flags=re.S)
    if re.search(r"\)[*+{]", bare) or _COMMENTS.search(pattern):
        return MAX_STEPS + 1
    repeats = len(re.findall(r"[*+?{]+", bare))
    ways, alternatives = 1, [1]
    for char in bare:
        if char == "(":
            alternatives.append(1)
        elif char == "|":
            alternatives[-1] += 1
        elif char == ")" and len(alternatives) > 1:
            ways *= alternatives.pop()
    return ways * math.prod(alternatives) * math.comb(_NAME_CHARS + repeats, repeats)
