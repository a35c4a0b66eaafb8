"""Values by patterns of module names, as in an adapter's config: regular expressions from untrusted
files.

A regular expression search cannot be stopped, and some never end. Those are refused, by a bound on
the number of ways in which they can match.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pymerge.interrupt import check

_MOST_PATTERNS = 10_000
_MOST_LETTERS = 1000  # of a pattern
# Ways to try a pattern at one place of a name, if a repetition takes a name of the usual length.
_MOST_WAYS = 1_000_000
_USUAL = 60
_LONGEST = 128  # name that is searched for a pattern with repetitions
# An escape, a set of letters, the beginning of a group, a number of times, or another letter.
_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]|\(\?:|\(\?|\{[\d,]*\}|.", re.S)


@dataclass(frozen=True)
class ByPattern:
    """Patterns with their values, in the order in which they are tried. repeats: whether any of
    them has repetitions or choices.
    """

    entries: tuple[tuple[re.Pattern[str], float], ...] = ()
    repeats: bool = False

    def of(self, module: str, usual: float) -> float:
        """The value of the first pattern that the end of a module's name matches, from a dot on, as
        peft reads them; else the usual one. ValueError for a name that is too long to be searched.
        """
        if self.repeats and len(module) > _LONGEST:
            raise ValueError(
                f"a name of {len(module)} characters is too long to be searched for patterns with"
                " repetitions"
            )
        check()
        return next((value for each, value in self.entries if each.match(module)), usual)


def by_pattern(values: Mapping[str, float]) -> ByPattern:
    """Compile the patterns of a config. ValueError with the reason for what is none, or may take
    for ever.
    """
    if len(values) > _MOST_PATTERNS:
        raise ValueError(f"has more than {_MOST_PATTERNS} patterns; download it again")
    entries, most = [], 1.0
    for pattern, value in values.items():
        try:
            if len(pattern) > _MOST_LETTERS:
                raise re.error("too long")
            re.compile(pattern)
            # As a part of this it may be none.
            entries.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{pattern[:40]!r} is no pattern ({error}); download it again"
            ) from None
        most = max(most, _ways(pattern))
        if most > _MOST_WAYS:
            raise ValueError(
                f"{pattern[:40]!r} is a pattern whose search may never end; write one without"
                " groups that repeat, flags and lookahead, or the names themselves"
            )
    return ByPattern(tuple(entries), most > 1)


def _ways(pattern: str) -> float:
    """A bound on the ways in which a pattern is tried at one place: the product of those of all its
    repetitions and choices. Infinity where groups repeat, and for lookahead, flags and the like.
    """
    ways = 1.0
    choices = [1]  # of the groups that are open
    before = ""
    for piece in _PIECE.findall(pattern):
        if piece in ("*", "+") or (piece[0] == "{" and len(piece) > 1):
            if before == ")":
                return math.inf
            ways *= _USUAL
        elif piece == "?":
            ways *= 2
        elif piece == "(?":
            return math.inf
        elif piece in ("(", "(?:"):
            choices.append(1)
        elif piece == "|":
            choices[-1] += 1
        elif piece == ")":
            ways *= choices.pop()
        before = piece
    return ways * choices[0]
