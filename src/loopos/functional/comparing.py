"""Compare validations (which is better) and answers (which is most frequent).

Training uses `is_better` to select the best checkpoint, reports use it to judge a finished run.
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
    """Whether `metric` is above (`mode` "max") or below ("min") `than` by more than `min_delta`.

    Equal metrics are decided by the lower loss, if both losses are known. None, nan and infinity are never better; any
    finite metric is better than an unknown one.
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
    """Index of the first occurrence of the most frequent key, and its fraction of all keys.

    Ties go to the key that occurs first. Keys that are None do not vote; None if no key votes.
    """
    votes = Counter(key for key in keys if key is not None)
    if not votes:
        return None
    winner, count = votes.most_common(1)[0]
    return keys.index(winner), count / len(keys)
