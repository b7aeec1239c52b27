"""Estimates of memory, disk and time of a run from shapes. Pure arithmetic; `dry_run` finds the counts.

Several processes: `planning.cluster`. Time for reading data and saving is not included.
Letters: P parameters, of which R train; T tokens of the largest forward pass; L layers that keep activations; d width,
k width of keys (or values), m feed-forward width, h heads, f bytes of a number in the run's format (2 or 4).
"""

from __future__ import annotations

from dataclasses import dataclass

# Forward and backward passes reach this fraction of the rate of large matrix products: the rest goes to norms, softmax,
# attention over short sequences and small layers. Whole runs measured 0.41 to 0.68 on two cores.
MATMUL_EFFICIENCY = 0.55
# Passes over an fp32 copy of the trained weights in one optimizer step, reads and writes: gradients collected (1.5),
# their norm (1), clipping (2), the weights updated (2) and rounded back (1.5).
STEP_PASSES = 8.0
# Buffers of varying sizes are freed and kept for reuse (`process`), so the heap grows beyond the largest step: to
# this many times its activations after 60 to 80 steps of SmolLM2-135M on a CPU. Other devices were not measured.
HEAP_GROWTH = 3.0
_FP32 = 4
# Rows whose logits a language model's loss computes at once.
_LOGIT_ROWS = 256


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of the transformer; `layers` counts those that keep activations for the backward pass."""

    width: int
    key_width: int
    feed_forward: int
    heads: int
    layers: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts. `trained` is the sum of matrices (2 dimensions, neither embedding nor head) and rest; `matrix_sides` is
    the sum of rows and columns of the trained matrices and embeddings; `multiplied` counts weights of linear layers,
    trained or not; `largest` those of the largest trained tensor.
    """

    total: int
    trained_matrices: int
    trained_rest: int
    matrix_sides: int
    multiplied: int
    largest: int

    @property
    def trained(self) -> int:
        """Parameters that train, now or from `unfreeze_step` on."""
        return self.trained_matrices + self.trained_rest


def optimizer_bytes(optimizer: str, momentum: float, parameters: Parameters) -> int:
    """State of the optimizer in fp32. sgd: none, or one momentum; adam, adamw: two moments; adafactor: one number per
    row and column; muon: one momentum for matrices, two moments for the rest.
    """
    if optimizer == "sgd":
        return _FP32 * parameters.trained if momentum > 0 else 0
    if optimizer == "adafactor":
        return _FP32 * parameters.matrix_sides
    if optimizer == "muon":
        return _FP32 * parameters.trained_matrices + 2 * _FP32 * parameters.trained_rest
    return 2 * _FP32 * parameters.trained


def activation_bytes(
    shape: Architecture, *, tokens: int, longest: int, number_bytes: int, recomputes: bool, tensor_parallel: int = 1
) -> int:
    """Kept from the forward for the backward pass: T · L · (f·(8d + 2k + 4m + h·n) + e).

    8d: twice a norm's input and output (4d), the query, attention's output, and both residual sums; 2k: keys and
    values; 4m: gate, its activation, the up projection and their product; h·n: attention probabilities over at most n
    (`longest`) tokens, 0 if a fused kernel keeps none. e = 8d for numbers of 2 bytes: norms keep their input in fp32.
    With recomputation each layer keeps only its input, and one layer at a time has all activations. Tensor parallelism
    divides all except norms and residual sums (6d and e).
    """
    upcast = 8 * shape.width if number_bytes == 2 else 0
    inside = 2 * shape.width + 2 * shape.key_width + 4 * shape.feed_forward + shape.heads * longest
    layer = tokens * (number_bytes * (6 * shape.width + inside // tensor_parallel) + upcast)
    if recomputes:
        return min(shape.layers, 1) * layer + tokens * shape.layers * number_bytes * shape.width
    return shape.layers * layer


def logit_bytes(*, width: int, vocabulary: int, number_bytes: int, trains_output: bool) -> int:
    """A language model's loss over V tokens: 256 · V · (4 + 2f) for the logits of a chunk of targets in fp32, their
    product and gradient; if the output embedding trains, its gradient in fp32 and that of one chunk: (4 + f) · V · d.
    """
    chunk = _LOGIT_ROWS * vocabulary * (_FP32 + 2 * number_bytes)
    return chunk + ((_FP32 + number_bytes) * vocabulary * width if trains_output else 0)


def cache_bytes(shape: Architecture, *, layers: int, rows: int, columns: int, number_bytes: int) -> int:
    """Keys and values of rows that are generated together: 2 · L · k · f for each of `columns` tokens of a row."""
    return rows * columns * 2 * layers * shape.key_width * number_bytes


def persistent_bytes(parameters: Parameters, *, half_precision: bool, optimizer_state: int) -> dict[str, int]:
    """Memory that training occupies all the time, by part: weights f·P, master weights 4·R beside weights of 2 bytes,
    gradients 4·R, and the optimizer's state as in `optimizer_bytes`.
    """
    trained = _FP32 * parameters.trained
    return {
        "weights": (2 if half_precision else _FP32) * parameters.total,
        "master weights": trained if half_precision else 0,
        "gradients": trained,
        "optimizer": optimizer_state,
    }


def memory_bytes(
    *,
    process: int,
    parameters: Parameters,
    half_precision: bool,
    optimizer_state: int,
    activations: int,
    reloads_best: bool,
    merges: bool,
) -> dict[str, int]:
    """Bytes by part; their sum is the peak, which comes at the end, when the model is exported from a full heap.

    process: the interpreter with its libraries and the data. weights to optimizer: as in `persistent_bytes`. buffers:
    `HEAP_GROWTH` times the activations, and the gradient of the largest tensor. export: the best checkpoint read back,
    4·R (`reloads_best`), and the weights converted from 2 to 4 bytes to merge adapters, 2·P (`merges`).
    """
    trained = _FP32 * parameters.trained
    return {
        "process": process,
        **persistent_bytes(parameters, half_precision=half_precision, optimizer_state=optimizer_state),
        "buffers": round(HEAP_GROWTH * activations) + gradient_bytes(parameters.largest, half_precision=half_precision),
        "export": (trained if reloads_best else 0) + (2 * parameters.total if merges and half_precision else 0),
    }


def copy_bytes(parameters: Parameters, *, half_precision: bool) -> int:
    """A second copy of the weights that train (a reference of its own): fp32, and the run's format beside it."""
    return (_FP32 + 2 if half_precision else _FP32) * parameters.trained


def gradient_bytes(largest: int, *, half_precision: bool) -> int:
    """The gradient of this many parameters while it is computed: in the run's format, and in fp32 beside weights of 2
    bytes before it is added to the sum.
    """
    return (2 + _FP32 if half_precision else _FP32) * largest


def disk_bytes(
    parameters: Parameters, *, half_precision: bool, optimizer_state: int, checkpoints: int
) -> dict[str, int]:
    """Bytes by part: each checkpoint contains 4·R and the optimizer's state; one more is written before the oldest is
    removed. The model folder contains f·P.
    """
    return {
        "checkpoint": _FP32 * parameters.trained + optimizer_state,
        "checkpoints": checkpoints * (_FP32 * parameters.trained + optimizer_state),
        "model": (2 if half_precision else _FP32) * parameters.total,
    }


def training_seconds(
    parameters: Parameters,
    *,
    tokens: int,
    validation_tokens: int,
    steps: int,
    optimizer_state: int,
    backward_fraction: float,
    operations_a_second: float,
    bytes_a_second: float,
    output: int = 0,
    targets: int = 0,
    validation_targets: int = 0,
    trains_output: bool = True,
) -> float:
    """Time of the optimizer steps and validations (s), without generated answers.

    A token costs 2 operations per multiplied parameter forward, 2 for the gradient of its input in layers that the
    backward pass reaches (`backward_fraction` of the layers), 2 for its own gradient if it trains. A language model
    multiplies its output embedding (`output` parameters) only for the targets. A step moves the trained weights
    `STEP_PASSES` times and the optimizer's state twice.
    """
    forward = 2.0 * parameters.multiplied
    backward = forward * backward_fraction + 2.0 * min(parameters.trained, parameters.multiplied)
    operations = tokens * (forward + backward) + validation_tokens * forward
    operations += targets * 2.0 * output * (3 if trains_output else 2) + validation_targets * 2.0 * output
    moved = steps * (STEP_PASSES * _FP32 * parameters.trained + 2.0 * optimizer_state)
    return operations / (operations_a_second * MATMUL_EFFICIENCY) + moved / bytes_a_second


def forward_seconds(
    parameters: Parameters, *, tokens: int, targets: int, output: int, operations_a_second: float
) -> float:
    """Time of forward passes of a frozen model (s): 2 operations per multiplied parameter and token, and per parameter
    of the output embedding and target.
    """
    operations = 2.0 * (tokens * parameters.multiplied + targets * output)
    return operations / (operations_a_second * MATMUL_EFFICIENCY)


def generation_seconds(
    parameters: Parameters,
    *,
    responses: int,
    new_tokens: int,
    prompt_tokens: int,
    together: int,
    output: int,
    number_bytes: int,
    operations_a_second: float,
    bytes_a_second: float,
) -> float:
    """Time to generate `responses` of `new_tokens` tokens each (s), without sampling and attention to generated tokens.

    Of at most `together` rows each gets a token in the time to read the multiplied weights, f·(P + V·d), or to multiply
    them, 2·(P + V·d) per row, if that is longer. Prompts, `prompt_tokens` in all, are multiplied before.
    """
    multiplied = parameters.multiplied + output
    rate = operations_a_second * MATMUL_EFFICIENCY
    waves = -(-responses // together)
    read = waves * new_tokens * number_bytes * multiplied / bytes_a_second
    return prompt_tokens * 2.0 * parameters.multiplied / rate + max(
        read, responses * new_tokens * 2.0 * multiplied / rate
    )
