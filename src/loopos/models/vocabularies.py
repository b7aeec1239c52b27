"""Two vocabularies compared.

Enters: token → number of two tokenizers. Leaves: how they differ, in words, with the first few tokens of each kind.
Left out: what is done about it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

_MOST_NAMED = 5


def vocabulary_difference(own: Mapping[str, int], theirs: Mapping[str, int], place: str) -> str:
    """How `theirs` differs from `own`, which is that of `place`; "" where it does not."""
    kinds = {
        f"that {place} lacks": [token for token in theirs if token not in own],
        "that it lacks": [token for token in own if token not in theirs],
        "with another number": [token for token in own if theirs.get(token, own[token]) != own[token]],
    }
    return ", ".join(f"{len(tokens):,} {kind} ({_some(tokens)})" for kind, tokens in kinds.items() if tokens)


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(json.dumps(token, ensure_ascii=False) for token in tokens[:_MOST_NAMED])
    return f"{shown}, …" if len(tokens) > _MOST_NAMED else shown
