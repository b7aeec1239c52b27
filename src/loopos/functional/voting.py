"""The answer that most agree on. Enters: a key an answer, None where it has no voice. Leaves: which key won, and by how
much. Left out: what makes two answers the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def plurality(keys: Sequence[str | None]) -> tuple[int, float] | None:
    """The place of the first of the keys that occur most, and their share of all; of equally many, the group that comes
    first wins. None where no key has a voice.
    """
    votes = Counter(key for key in keys if key is not None)
    if not votes:
        return None
    winner, count = votes.most_common(1)[0]
    return keys.index(winner), count / len(keys)
