"""Which of two validations is better.

Enters: a metric of each, and the loss of each. Leaves: a verdict. Training decides by it what is kept, and reports
decide by it what they say of a finished run. Left out: which metric it is.

The answer that most agree on. Enters: a key an answer, None where it has no voice. Leaves: which key won, and by how
much. Left out: what makes two answers the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def is_better(
    metric: float | None,
    than: float | None,
    mode: str,
    *,
    loss: float | None = None,
    than_loss: float | None = None,
    min_delta: float = 0.0,
) -> bool:
    """Whether `metric` is above (`mode` "max") or below ("min") `than` by more than `min_delta`; of equal metrics the
    one with the lower loss, where both are known. None, nan and infinity are never better; any finite metric is better
    than an unknown one.
    """
    if metric is None or not math.isfinite(metric):
        return False
    if than is None or not math.isfinite(than):
        return True
    if metric == than:
        known = loss is not None and than_loss is not None and math.isfinite(loss)
        return known and loss < than_loss  # type: ignore[operator]
    return (metric - than if mode == "max" else than - metric) > min_delta


def plurality(keys: Sequence[str | None]) -> tuple[int, float] | None:
    """The place of the first of the keys that occur most, and their share of all; of equally many, the group that comes
    first wins. None where no key has a voice.
    """
    votes = Counter(key for key in keys if key is not None)
    if not votes:
        return None
    winner, count = votes.most_common(1)[0]
    return keys.index(winner), count / len(keys)
