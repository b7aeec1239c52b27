"""What to ask next: a strategy gives every item that nobody has judged a number, and the greatest comes next.

    strategy(items, begun) → one number per item

`begun` are the items that have votes or are being judged. Whatever the strategy, a fraction of the items is drawn at
random, so that estimates have a sample of all items (`queue`).
Letters: N items, B begun items, F features, M reward models.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any, TypeAlias

from loopos.config.diagnostics import UserError
from loopos.config.own_function import OwnFunction
from loopos.config.study_variants import STUDY_STRATEGIES
from loopos.data.record import shown
from loopos.studies.items import Item, text_of

NUM_FEATURES = 512
_WORD = re.compile(r"\w+")
Features: TypeAlias = Any
"""A numpy array `[F]` or `[N, F]`; numpy is imported when features are made."""


def at_random(items: Sequence[Item], begun: Sequence[Item]) -> list[float]:
    """Draws items at random, by the study's seed: every item has the same number."""
    return [0.0] * len(items)


def disagreement(items: Sequence[Item], begun: Sequence[Item]) -> list[float]:
    """Takes the items on which the models of a reward ensemble disagree most: std over m of σ(r_m1 − r_m2).

    r_m1 and r_m2 are the rewards of the two responses by model m. Raises `UserError` for an item without the rewards of
    two models (query by committee: Seung et al. 1992; for rewards: Christiano et al. 2017, section 2.2.4).
    """
    return [statistics.pstdev(_probabilities(item, "disagreement", least=2)) for item in items]


def uncertainty(items: Sequence[Item], begun: Sequence[Item]) -> list[float]:
    """Takes the items whose outcome is least certain: −|p − ½|, p the mean over m of σ(r_m1 − r_m2).

    Raises `UserError` for an item without rewards (uncertainty sampling: Lewis and Gale 1994).
    """
    return [-abs(statistics.fmean(_probabilities(item, "uncertainty", least=1)) - 0.5) for item in items]


class Diversity:
    """Takes the items that are farthest from all that were begun: min over b of 1 − cos(f_i, f_b).

    f are counts of hashed words and pairs of words of the prompt and its responses. This is the greedy k-center choice
    (Sener and Savarese 2018, algorithm 1). Features are made once per item.
    """

    def __init__(self) -> None:
        self._features: dict[str, Features] = {}

    def __call__(self, items: Sequence[Item], begun: Sequence[Item]) -> list[float]:
        """One distance per item, from 0 to 1."""
        if not begun:
            return [0.0] * len(items)
        import numpy

        nearest = (self._matrix(items) @ self._matrix(begun).T).max(axis=1)
        distances: list[float] = numpy.maximum(0.0, 1.0 - nearest).tolist()
        return distances

    def _matrix(self, items: Sequence[Item]) -> Features:
        import numpy

        for item in items:
            if item.id not in self._features:
                self._features[item.id] = features_of(item)
        return numpy.stack([self._features[item.id] for item in items])


def features_of(item: Item) -> Features:
    """The counts of hashed words and pairs of words of an item, as a vector of length 1, `[F]`."""
    import numpy

    found = numpy.zeros(NUM_FEATURES, dtype=numpy.float32)
    for text in (text_of(item.prompt), *(response.text for response in item.responses)):
        words = _WORD.findall(text.lower())
        for gram in (*words, *(" ".join(pair) for pair in itertools.pairwise(words))):
            number = int.from_bytes(hashlib.blake2b(gram.encode("utf-8", "surrogatepass"), digest_size=8).digest())
            # The sign keeps collisions from adding up (Weinberger et al. 2009, equation 2).
            found[(number >> 1) % NUM_FEATURES] += 1.0 if number & 1 else -1.0
    length = float(numpy.linalg.norm(found))
    return found / length if length > 0 else found


def opened(name: str) -> OwnFunction:
    """The strategy of a config; a class is made without arguments. Raises `UserError`."""
    found = STUDY_STRATEGIES[name].load()
    strategy = found() if isinstance(found, type) else found
    return OwnFunction(f"study strategy {name}", strategy)


def best_of(strategy: OwnFunction, items: Sequence[Item], begun: Sequence[Item], order: Sequence[float]) -> int:
    """Index of the item with the greatest number; of equals, that of the least `order`. Raises `UserError` where the
    strategy does not return one finite number per item.
    """
    returned = strategy(items, begun, about=f"{len(items)} items")
    values = [float(each) for each in returned] if hasattr(returned, "__len__") else None
    if values is None or len(values) != len(items) or not all(map(math.isfinite, values)):
        raise strategy.error(f"returned {shown(returned)}; expected a list of {len(items)} finite numbers")
    return min(range(len(items)), key=lambda index: (-values[index], order[index]))


def _probabilities(item: Item, strategy: str, *, least: int) -> list[float]:
    """σ(r_1 − r_2) by each model, `[M]`."""
    if len(item.margins) < least:
        raise UserError(
            f"item {item.id}: got the rewards of {len(item.margins)} models; the strategy {strategy} expects those of "
            f"{least} or more for both responses\n    score the items with `loopos score`, or use another strategy"
        )
    return [0.5 * (1.0 + math.tanh(margin / 2)) for margin in item.margins]
