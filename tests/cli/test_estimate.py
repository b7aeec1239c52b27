"""Memory, disk and time of a run, against figures reckoned by hand."""

from __future__ import annotations

import pytest

from loopos.planning.estimate import (
    HEAP_GROWTH,
    MATMUL_EFFICIENCY,
    STEP_PASSES,
    Architecture,
    Parameters,
    activation_bytes,
    disk_bytes,
    memory_bytes,
    optimizer_bytes,
    training_seconds,
)

# 100 parameters, of which 60 in matrices and 20 beside them train; the trained matrices have 16 rows and columns, the
# largest tensor 10.
SMALL = Parameters(total=100, trained_matrices=60, trained_rest=20, matrix_sides=16, multiplied=70, largest=10)
# d = 4, k = 2, m = 8, h = 2, two layers.
TINY = Architecture(width=4, key_width=2, feed_forward=8, heads=2, layers=2)


@pytest.mark.parametrize(
    ("optimizer", "momentum", "expected"),
    [
        ("sgd", 0.0, 0),
        ("sgd", 0.9, 320),
        ("adam", 0.0, 640),
        ("adamw", 0.0, 640),
        ("adafactor", 0.0, 64),
        ("muon", 0.0, 240 + 160),
    ],
)
def test_optimizer_state(optimizer: str, momentum: float, expected: int) -> None:
    assert optimizer_bytes(optimizer, momentum, SMALL) == expected


def test_activations_in_fp32() -> None:
    # A token and layer: 8·4 + 2·2 + 4·8 + 2·5 = 78 numbers of 4 bytes; 10 tokens, 2 layers.
    assert activation_bytes(TINY, tokens=10, longest=5, number_bytes=4, recomputes=False) == 2 * 10 * 78 * 4


def test_norms_of_half_precision_keep_their_input_in_fp32() -> None:
    assert activation_bytes(TINY, tokens=10, longest=5, number_bytes=2, recomputes=False) == 2 * 10 * (78 * 2 + 32)


def test_recomputation_keeps_the_inputs_and_one_layer() -> None:
    kept = activation_bytes(TINY, tokens=10, longest=5, number_bytes=4, recomputes=True)
    assert kept == 10 * 78 * 4 + 10 * 2 * 4 * 4


def test_frozen_layers_keep_nothing() -> None:
    frozen = Architecture(width=4, key_width=2, feed_forward=8, heads=2, layers=0)
    for recomputes in (False, True):
        assert activation_bytes(frozen, tokens=10, longest=5, number_bytes=4, recomputes=recomputes) == 0


def memory(*, half_precision: bool, reloads_best: bool = False, merges: bool = False) -> dict[str, int]:
    return memory_bytes(
        process=1000,
        parameters=SMALL,
        half_precision=half_precision,
        optimizer_state=640,
        activations=50,
        reloads_best=reloads_best,
        merges=merges,
    )


def test_memory_in_half_precision_has_master_weights_beside_the_weights() -> None:
    assert memory(half_precision=True) == {
        "process": 1000,
        "weights": 200,
        "master weights": 320,
        "gradients": 320,
        "optimizer": 640,
        "buffers": int(50 * HEAP_GROWTH) + 6 * 10,
        "export": 0,
    }


def test_memory_in_fp32_has_no_master_weights() -> None:
    parts = memory(half_precision=False)
    assert (parts["weights"], parts["master weights"], parts["buffers"]) == (400, 0, int(50 * HEAP_GROWTH) + 4 * 10)


def test_export_reads_the_best_back_and_widens_what_adapters_are_folded_into() -> None:
    assert memory(half_precision=True, reloads_best=True)["export"] == 320
    assert memory(half_precision=True, reloads_best=True, merges=True)["export"] == 320 + 200
    assert memory(half_precision=False, merges=True)["export"] == 0


def test_disk() -> None:
    assert disk_bytes(SMALL, half_precision=True, optimizer_state=640, checkpoints=3) == {
        "checkpoint": 960,
        "checkpoints": 2880,
        "model": 200,
    }


def seconds(*, tokens: int = 0, validation_tokens: int = 0, steps: int = 0, backward_fraction: float = 1.0) -> float:
    """With rates at which one operation at full efficiency, or one byte, takes a second."""
    return training_seconds(
        SMALL,
        tokens=tokens,
        validation_tokens=validation_tokens,
        steps=steps,
        optimizer_state=640,
        backward_fraction=backward_fraction,
        operations_a_second=1.0 / MATMUL_EFFICIENCY,
        bytes_a_second=1.0,
    )


def test_a_token_costs_two_operations_forward_and_four_backward() -> None:
    # 70 multiplied: 140 forward, 140 for the inputs' gradients, 140 for those 70 of the 80 trained that are multiplied.
    assert seconds(tokens=10) == pytest.approx(10 * 3 * 140)


def test_a_validated_token_costs_its_forward_pass() -> None:
    assert seconds(validation_tokens=10) == pytest.approx(1400)


def test_frozen_lower_layers_save_their_part_of_the_backward_pass() -> None:
    assert seconds(tokens=1) - seconds(tokens=1, backward_fraction=0.25) == pytest.approx(0.75 * 140)


def test_a_step_moves_weights_and_state() -> None:
    assert seconds(steps=2) == pytest.approx(2 * (STEP_PASSES * 4 * 80 + 2 * 640))
