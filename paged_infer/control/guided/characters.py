"""Sets of characters, and their bytes: in UTF-8, or inside a JSON string.

A set is a sorted tuple of ranges (first, last) of code points, both ends included. Surrogates (U+D800 to U+DFFF) are
never in a set, since UTF-8 cannot encode them.

A sequence of byte ranges stands for all byte strings with one byte from each range:

    U+0080 to U+07FF    [c2-df] [80-bf]
    U+0041 to U+005A    [41-5a]
    "                   [5c] [22]           in JSON: a backslash and the quote
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

Ranges = tuple[tuple[int, int], ...]
ByteRanges = list[tuple[int, int]]
Encoding = Callable[[Ranges], Iterator[ByteRanges]]

LAST = 0x10FFFF
_LENGTH_LIMITS = (0x7F, 0x7FF, 0xD7FF, 0xFFFF, LAST)  # the last of 1, 2, 3, 3 and 4 bytes; surrogates follow U+D7FF


def ranges_of(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """The union of ranges, without surrogates."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pairs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    parts = (
        (max(first, low), min(last, high)) for first, last in merged for low, high in ((0, 0xD7FF), (0xE000, LAST))
    )
    return tuple((first, last) for first, last in parts if first <= last)


def complement(ranges: Ranges) -> Ranges:
    edges = [-1, *(edge for pair in ranges for edge in pair), LAST + 1]
    return ranges_of((a + 1, b - 1) for a, b in zip(edges[::2], edges[1::2], strict=True) if a + 1 <= b - 1)


def intersection(one: Ranges, other: Ranges) -> Ranges:
    return complement(ranges_of((*complement(one), *complement(other))))


ANY = ranges_of([(0, LAST)])


def utf8(ranges: Ranges) -> Iterator[ByteRanges]:
    """The characters as UTF-8."""
    for first, last in ranges:
        start = first
        for limit in _LENGTH_LIMITS:
            if start <= min(limit, last):
                yield from _of_one_length(start, min(limit, last))
                start = max(start, limit + 1)


def _of_one_length(first: int, last: int) -> Iterator[ByteRanges]:
    """Characters whose UTF-8 encodings have the same length, as few sequences of one range for each byte."""
    low, high = chr(first).encode(), chr(last).encode()
    for num_following in range(len(low) - 1, 0, -1):
        size = 1 << 6 * num_following  # number of characters that differ in the last ``num_following`` bytes only
        if first // size != last // size:
            if first % size:
                yield from _of_one_length(first, first | size - 1)
                yield from _of_one_length((first | size - 1) + 1, last)
                return
            if (last + 1) % size:
                yield from _of_one_length(first, (last & ~(size - 1)) - 1)
                yield from _of_one_length(last & ~(size - 1), last)
                return
    yield list(zip(low, high, strict=True))


_ESCAPES = {ord(character): escape for character, escape in zip('"\\\b\f\n\r\t', '"\\bfnrt', strict=True)}
_PLAIN = complement(ranges_of([(0, 0x1F), (ord('"'), ord('"')), (ord("\\"), ord("\\"))]))


def in_json(ranges: Ranges) -> Iterator[ByteRanges]:
    """The characters in a JSON string, spelled as ``json.dumps(..., ensure_ascii=False)`` does.

    A quote, a backslash and control characters are escaped; all others stand for themselves.
    """
    yield from utf8(intersection(ranges, _PLAIN))
    for first, last in ranges:
        for character in (*range(first, min(last, 0x1F) + 1), *(c for c in (0x22, 0x5C) if first <= c <= last)):
            escape = "\\" + _ESCAPES.get(character, f"u{character:04x}")
            yield [(byte, byte) for byte in escape.encode()]
