"""The uniform numbers: fixed only by seed, prompt and sample, uniformly distributed and uncorrelated."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from loopos.generation.sampling import stream_key, uniforms


def test_splitmix_reference_values() -> None:
    """The published generator, seeded with 1234567, begins with these numbers (Rosetta Code, "Pseudo-random numbers/Splitmix64")."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    got = uniforms([1234567] * 5, [1, 2, 3, 4, 5])
    assert got.tolist() == [(number >> 11) / 2**53 for number in expected]


def test_numbers_are_uniform_and_unrelated() -> None:
    keys = [stream_key(seed, [prompt], sample) for seed in range(4) for prompt in range(20) for sample in range(5)]
    assert len(set(keys)) == 400
    table = np.stack([uniforms(keys, [draw] * 400).numpy() for draw in range(50)])
    assert stats.kstest(table.reshape(-1), "uniform").pvalue > 0.01
    between_draws = np.corrcoef(table[:-1].reshape(-1), table[1:].reshape(-1))[0, 1]
    between_streams = np.corrcoef(table[:, :-1].reshape(-1), table[:, 1:].reshape(-1))[0, 1]
    assert abs(between_draws) < 0.025
    assert abs(between_streams) < 0.025


def test_a_key_depends_on_every_part_and_on_nothing_else() -> None:
    key = stream_key(7, [3, 4, 5], 0)
    assert key == stream_key(7, (3, 4, 5), 0)
    assert len({key, stream_key(8, [3, 4, 5], 0), stream_key(7, [3, 4, 6], 0), stream_key(7, [3, 4, 5], 1)}) == 4
    assert stream_key(1, [2], 11) != stream_key(11, [2], 1)


def test_range_and_type() -> None:
    got = uniforms([0, 2**64 - 1], [0, 12345])
    assert got.dtype == torch.float64
    assert bool(((got >= 0) & (got < 1)).all())
