"""One stream of uniform numbers a completion, by counting: no state, so no order of calls can change it.

Enters: the seed, the prompt's tokens, which sample of it, the number of the draw. Leaves: a uniform number. The same
seed and prompt give the same numbers in whatever batch and place the prompt runs. Left out: what is drawn with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def stream_key(seed: int, prompt: Sequence[int], sample: int) -> int:
    """64 bits that tell this completion's stream from every other's. `sample` counts the completions that share seed
    and prompt.
    """
    digest = hashlib.blake2b(np.asarray(prompt, dtype=np.int64).tobytes(), digest_size=8, key=b"prompt")
    digest.update(f"{seed} {sample}".encode())
    return int.from_bytes(digest.digest(), "little")


def uniforms(keys: Sequence[int], draws: Sequence[int]) -> Tensor:
    """The uniform numbers in [0, 1) of these streams at these places, `[B]` float64 with 53 random bits.

    SplitMix64 (Steele et al. 2014) in its counter form: mix(key + draw · golden ratio).
    """
    words = np.asarray(keys, dtype=np.uint64) + np.asarray(draws, dtype=np.uint64) * np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words = words ^ (words >> np.uint64(31))
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)
