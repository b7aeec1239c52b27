"""Pairs of texts that are nearly equal, as index pairs.

Two texts are near if their sets of 5 characters in a row, ignoring case, punctuation and white space, have at least
`NEAR` of their union in common (Jaccard). MinHash (Broder 1997) with bands (Leskovec et al., Mining of Massive
Datasets, section 3.4) finds candidates: 16 bands of 4 hashes find a pair at 0.8 with probability 0.9998. Each candidate
is then compared exactly. Memory: about 700 bytes a text. Equal texts (`repeats`) are near too.
Apart from `data check`, its only user: an algorithm that knows neither rows nor columns.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

NEAR = 0.8
MOST_TEXTS = 50_000
MOST_CHARACTERS = 10_000
"""Of longer texts the beginning is compared."""
_SHINGLE = 5
_BANDS, _HASHES_A_BAND = 16, 4
_MOST_CANDIDATES = 8
_WORD = re.compile(r"\w+")
_Hashes = NDArray[numpy.uint64]


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """`pairs`: (index of a text, index of an earlier one that is near), one for each text that has any. `compared`: how
    many texts were, the first ones.
    """

    pairs: list[tuple[int, int]]
    compared: int


def near_duplicates(texts: Sequence[str]) -> NearDuplicates:
    """The texts that are nearly the same as an earlier one, among the first `MOST_TEXTS`."""
    factors = numpy.random.PCG64(1).random_raw(_BANDS * _HASHES_A_BAND) | numpy.uint64(1)
    buckets: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(_BANDS)]
    pairs: list[tuple[int, int]] = []
    compared = min(len(texts), MOST_TEXTS)
    for index in range(compared):
        shingles = _shingles(texts[index])
        if not len(shingles):
            continue
        keys = _band_keys(shingles, factors)
        candidates = dict.fromkeys(
            other for band, key in zip(buckets, keys, strict=True) for other in band.get(key, ())[:_MOST_CANDIDATES]
        )
        twin = next((other for other in candidates if _likeness(shingles, _shingles(texts[other])) >= NEAR), None)
        if twin is not None:
            # Those that are near this one are most often near its twin too, which stays in the buckets.
            pairs.append((index, twin))
            continue
        for band, key in zip(buckets, keys, strict=True):
            band[key].append(index)
    return NearDuplicates(pairs, compared)


def _shingles(text: str) -> _Hashes:
    """The different runs of characters of a text, hashed."""
    plain = " ".join(_WORD.findall(text[:MOST_CHARACTERS].casefold()))
    codes = numpy.frombuffer(plain.encode("utf-32-le", errors="replace"), dtype=numpy.uint32).astype(numpy.uint64)
    if len(codes) < _SHINGLE:
        codes = numpy.pad(codes, (0, _SHINGLE - len(codes))) if len(codes) else codes
    if not len(codes):
        return codes
    hashes = numpy.zeros(len(codes) - _SHINGLE + 1, dtype=numpy.uint64)
    for offset in range(_SHINGLE):
        hashes = hashes * numpy.uint64(1_000_003) + codes[offset : len(codes) - _SHINGLE + 1 + offset]
    # Mixed (Steele et al. 2014), so that the least of a product is that of a random order.
    hashes = (hashes ^ (hashes >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return numpy.unique(hashes ^ (hashes >> numpy.uint64(31)))


def _band_keys(shingles: _Hashes, factors: _Hashes) -> list[bytes]:
    """The least hash of the set under each of the random orders, four to a band."""
    least = (shingles[:, None] * factors[None, :]).min(axis=0)
    return [least[first : first + _HASHES_A_BAND].tobytes() for first in range(0, len(least), _HASHES_A_BAND)]


def _likeness(one: _Hashes, other: _Hashes) -> float:
    """The share of their union that two sets have in common."""
    common = len(numpy.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)
