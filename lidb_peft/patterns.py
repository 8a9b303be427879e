"""Names of layers as PEFT's configs have them, a suffix or a regular expression, from files of anybody.

Python's regular expressions take exponential time on some patterns. What a file brings is bounded before it is run: the
ways in which a pattern can be tried on a name multiply over its alternatives and repetitions, and their product is
limited. Nested repetitions, of more than one character, are refused.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from .safe_read import printable

try:
    # typeshed leaves private names out.
    from re import _constants as _codes  # type: ignore[attr-defined]
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as _codes
    import sre_parse as _parser

PATTERN_FIELDS = (
    "target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "scale_pattern",
)  # fmt: skip
"""Fields of `LiDBConfig` whose names PEFT tries as regular expressions."""

_LITERAL = re.compile(r"[\w.-]*")
_MAX_NAMES, _MAX_CHARS = 10_000, 2000
_MAX_TRIES = 1_000_000  # on one name, of all patterns together
_NAME_CHARS = 100  # of a layer's name
_REPEATS = {_codes.MAX_REPEAT, _codes.MIN_REPEAT, getattr(_codes, "POSSESSIVE_REPEAT", None)}
_SINGLE = {_codes.LITERAL, _codes.NOT_LITERAL, _codes.ANY, _codes.IN}


def check_patterns(patterns: Iterable[object] | str | None, source: str) -> None:
    """Make sure that names or regular expressions from a file can be tried on all layers in no time.

    Raises:
        ValueError: they are no text, no regular expressions, too many, or could take forever; the message begins with
            ``source``.
    """
    if not isinstance(patterns, Iterable | None):
        raise ValueError(f"{source} is {patterns!r}, which names no layers; it is damaged")
    given = [patterns] if isinstance(patterns, str) else list(patterns or ())
    if len(given) > _MAX_NAMES:
        raise ValueError(f"{source} names layers by {len(given)} patterns, more than the {_MAX_NAMES} that are read")
    tries, longest = 0, ""
    for pattern in given:
        if not isinstance(pattern, str) or len(pattern) > _MAX_CHARS:
            raise ValueError(f"{source} names layers by {printable(repr(pattern))}, which is not a name; it is damaged")
        if not _LITERAL.fullmatch(pattern):
            tries += _tries(pattern, source)
        longest = max(longest, pattern, key=len)
    if tries > _MAX_TRIES:
        raise ValueError(f"{source} names layers by regular expressions that can take too long to try, such as "
                         f"{printable(repr(longest))}; name the layers themselves")  # fmt: skip


def find_pattern(patterns: Mapping[str, object], name: str, source: str = "") -> str | None:
    """Return the first key that means the layer ``name`` by PEFT's rules: all of it, or what follows a dot.

    Args:
        source: the file that the patterns come from, for messages; "" trusts them.

    Raises:
        ValueError: as `check_patterns`, of patterns from a file.
    """
    if not patterns:
        return None
    literals, expressions = _sorted_patterns(tuple(patterns), source)
    parts = name.split(".")
    suffixes = (".".join(parts[start:]) for start in range(len(parts)))
    found = [literals[suffix] for suffix in suffixes if suffix in literals]
    found += [place for place, expression in expressions if expression.match(name)]
    return list(patterns)[min(found)] if found else None


@lru_cache(maxsize=8)
def _sorted_patterns(patterns: tuple[str, ...], source: str) -> tuple[dict[str, int], list[tuple[int, re.Pattern]]]:
    """Names, and the others compiled, with their places."""
    if source:
        check_patterns(patterns, source)
    literals = {pattern: place for place, pattern in enumerate(patterns) if _LITERAL.fullmatch(pattern)}
    expressions = [
        (place, re.compile(rf"(.*\.)?({pattern})$"))
        for place, pattern in enumerate(patterns)
        if pattern not in literals
    ]
    return literals, expressions


def _tries(pattern: str, source: str) -> int:
    try:
        return _ways(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        shown = printable(repr(pattern))
        raise ValueError(f"{source} names layers by the regular expression {shown}, which is none that is read "
                         f"({error}); name the layers themselves") from error  # fmt: skip


def _ways(parsed: Iterable) -> int:
    """In how many ways a pattern can be tried at one place, at most."""
    ways = 1
    for code, argument in parsed:
        if code in _REPEATS:
            least, most, repeated = argument
            is_single = len(repeated) == 1 and repeated[0][0] in _SINGLE
            if not is_single and most > 1:
                raise re.error("something longer than a character is repeated")
            ways *= min(int(most) - least + 1, _NAME_CHARS) if is_single else 1 + _ways(repeated)
        elif code is _codes.BRANCH:
            ways *= sum(_ways(branch) for branch in argument[1])
        elif code is _codes.SUBPATTERN:
            ways *= _ways(argument[-1])
        elif code not in _SINGLE and code is not _codes.AT:
            raise re.error("it looks ahead, behind or back")
    return ways
