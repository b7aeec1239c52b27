"""The math of merging: several tensors of the same name, and perhaps a base, to one tensor. Pure torch, fp32.

Most functions write into their arguments and work in chunks, because a tensor may be a tenth of a model and copies
would dominate memory. The largest elements are found exactly by counting: sorting would make an index twice as large as
the tensor. Letters: θ_i the tensor of model i of N, w_i its weight, θ_0 the base, δ_i = θ_i − θ_0 its delta, n
elements.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.config.registry import loaded
from loopos.config.variants import MERGE_METHODS

CHUNK = 2**20
"""Elements processed at a time."""


def keep_largest(values: Tensor, count: int) -> None:
    """Sets all except the `count` elements of largest magnitude to 0, in place; of equal ones the first stay."""
    if count >= values.numel():
        return
    if count == 0:
        values.zero_()
        return
    threshold, above = magnitude_at(values, count)
    for chunk in chunks(values):
        chunk.mul_(chunk.abs() >= threshold)
    _zero_equal(values, threshold, slice(count - above, None))


def zero_largest(values: Tensor, count: int) -> None:
    """Sets the `count` elements of largest magnitude to 0, in place; of equal ones the first."""
    if count == 0:
        return
    threshold, above = magnitude_at(values, count)
    for chunk in chunks(values):
        chunk.mul_(chunk.abs() <= threshold)
    _zero_equal(values, threshold, slice(0, count - above))


def _zero_equal(values: Tensor, magnitude: float, which: slice) -> None:
    """Sets the elements of exactly this magnitude that `which` selects to 0, in their order."""
    if magnitude > 0:
        flat = values.view(-1)
        flat[(flat.abs() == magnitude).nonzero().squeeze(1)[which]] = 0.0


def magnitude_at(values: Tensor, count: int) -> tuple[float, int]:
    """The magnitude of the element with rank `count` (from 1) by falling magnitude, and how many are larger.

    The bits of positive floats are ordered like their values: two counts, of 16 and 15 bits, find it exactly, without
    the index that sorting makes.
    """
    high, above = _bucket_at((_bits(chunk) >> 15 for chunk in chunks(values)), 2**16, count)
    low_bits = (bits[(bits >> 15) == high] & 0x7FFF for bits in map(_bits, chunks(values)))
    low, more = _bucket_at(low_bits, 2**15, count - above)
    found = torch.tensor([(high << 15) | low], dtype=torch.int32).view(torch.float32)
    return float(found), above + more


def _bucket_at(numbers: Iterable[Tensor], size: int, count: int) -> tuple[int, int]:
    """Of integers below `size` the one with rank `count` by falling value, and how many are larger."""
    counts = torch.zeros(size, dtype=torch.int64)
    for part in numbers:
        counts += torch.bincount(part, minlength=size)
    reached = counts.flip(0).cumsum(0)
    rank = int((reached < count).sum())
    return size - 1 - rank, int(reached[rank - 1]) if rank else 0


def _bits(chunk: Tensor) -> Tensor:
    return chunk.abs().view(torch.int32)


def chunks(values: Tensor) -> Iterator[Tensor]:
    """Parts of a tensor as flat views of at most `CHUNK` elements."""
    # torch has no annotations for this method.
    yield from values.view(-1).split(CHUNK)  # type: ignore[no-untyped-call]


COLINEAR = 0.9995
"""Cosine above which `slerp` interpolates linearly: sin Ω, by which it divides, is then below 0.032."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a merge for one tensor; see `config.merge`. The drop_* values are fractions of the elements."""

    t: float = 0.5
    scale: float = 1.0
    density: float = 1.0
    epsilon: float = 0.0
    drop_smallest: float = 0.0
    drop_largest: float = 0.0
    normalize: bool = True


@dataclass(frozen=True, slots=True)
class DeltaRow:
    """A method on deltas: how each is sparsified, and whether signs are elected before the sum."""

    thin: Literal["none", "trim", "drop", "ranked_drop", "breadcrumbs"]
    elects: bool


DELTA_METHODS: Mapping[str, DeltaRow] = {
    "task_arithmetic": DeltaRow("none", elects=False),
    "ties": DeltaRow("trim", elects=True),
    "dare_linear": DeltaRow("drop", elects=False),
    "dare_ties": DeltaRow("drop", elects=True),
    "della_linear": DeltaRow("ranked_drop", elects=False),
    "della": DeltaRow("ranked_drop", elects=True),
    "breadcrumbs": DeltaRow("breadcrumbs", elects=False),
    "breadcrumbs_ties": DeltaRow("breadcrumbs", elects=True),
}

Draws: TypeAlias = Callable[[int], torch.Generator]
"""The random generator of a model, by its index among the models."""


def generator_of(seed: int, name: str, index: int) -> torch.Generator:
    """The random numbers of one tensor of one model; independent of the order of tensors and of their files."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class MergeInputs:
    """One tensor of every model, in fp32. `tensors`: read once, in order, and free to be written into; `weights`: of
    the models; `base`: the base model's, for methods that need one; `draws`: for methods that draw random numbers.
    """

    tensors: Iterable[Tensor]
    weights: Sequence[float]
    parameters: Parameters
    base: Tensor | None = None
    draws: Draws | None = None


def merged(
    method: str,
    tensors: Iterable[Tensor],
    weights: Sequence[float],
    parameters: Parameters,
    *,
    base: Tensor | None = None,
    draws: Draws | None = None,
) -> Tensor:
    """One tensor by the method of this name, or by "module:name". Sums keep one of `tensors` at a time. base: for the
    methods whose row says so; draws: for those that drop at random. Raises `UserError` for a result that is no tensor.
    """
    found = loaded(MERGE_METHODS[method].function)(MergeInputs(tensors, weights, parameters, base, draws))
    if not isinstance(found, Tensor):
        raise UserError(f'method "{method}": its function returned {type(found).__name__}; expected one tensor')
    return found


def merge_linear(inputs: MergeInputs) -> Tensor:
    """The weighted sum of the models, with normalize their mean (Wortsman et al. 2022)."""
    return linear(inputs.tensors, inputs.weights, normalize=inputs.parameters.normalize)


def merge_slerp(inputs: MergeInputs) -> Tensor:
    """Spherical interpolation between two models (Shoemake 1985)."""
    first, second = inputs.tensors
    return slerp(first, second, inputs.parameters.t)


def merge_model_stock(inputs: MergeInputs) -> Tensor:
    """Between the mean of the models and the base, by the angle of their deltas (Jang et al. 2024)."""
    base = inputs.base
    assert base is not None, "checked by config.merge"
    return model_stock(base, [tensor.sub_(base) for tensor in inputs.tensors])


def merge_task_arithmetic(inputs: MergeInputs) -> Tensor:
    """The base plus the weighted sum of the models' deltas (Ilharco et al. 2023)."""
    return _merged_deltas("task_arithmetic", inputs)


def merge_ties(inputs: MergeInputs) -> Tensor:
    """Deltas trimmed to their largest elements, and merged where their signs agree (Yadav et al. 2023)."""
    return _merged_deltas("ties", inputs)


def merge_dare_linear(inputs: MergeInputs) -> Tensor:
    """Elements of deltas dropped at random, the rest scaled up and summed (Yu et al. 2024)."""
    return _merged_deltas("dare_linear", inputs)


def merge_dare_ties(inputs: MergeInputs) -> Tensor:
    """Elements of deltas dropped at random, the rest merged where their signs agree (Yu et al. 2024)."""
    return _merged_deltas("dare_ties", inputs)


def merge_della_linear(inputs: MergeInputs) -> Tensor:
    """Elements of deltas dropped at random, small ones more often, the rest summed (Deep et al. 2024)."""
    return _merged_deltas("della_linear", inputs)


def merge_della(inputs: MergeInputs) -> Tensor:
    """Elements of deltas dropped at random, small ones more often, the rest merged where their signs agree (Deep et al.
    2024).
    """
    return _merged_deltas("della", inputs)


def merge_breadcrumbs(inputs: MergeInputs) -> Tensor:
    """Deltas without their smallest and largest elements, summed (Davari & Belilovsky 2023)."""
    return _merged_deltas("breadcrumbs", inputs)


def merge_breadcrumbs_ties(inputs: MergeInputs) -> Tensor:
    """Deltas without their smallest and largest elements, merged where their signs agree (Davari & Belilovsky 2023)."""
    return _merged_deltas("breadcrumbs_ties", inputs)


def _merged_deltas(method: str, inputs: MergeInputs) -> Tensor:
    base, weights, parameters, row = inputs.base, inputs.weights, inputs.parameters, DELTA_METHODS[method]
    assert base is not None, method
    deltas = _deltas(row, iter(inputs.tensors), base, len(weights), parameters, inputs.draws)
    if row.elects:
        change = elected(list(deltas), weights, normalize=parameters.normalize)
    else:
        change = linear(deltas, weights, normalize=parameters.normalize)
    return change.mul_(parameters.scale).add_(base)


def linear(tensors: Iterable[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Σ w_i θ_i, divided by Σ w_i with `normalize`; equal weights are the uniform soup. Writes into the tensors.

    Wortsman et al. 2022, "Model soups", section 2; of deltas it is the sum of Ilharco et al. 2023, "Editing models with
    task arithmetic", section 2. Weights that sum to 0 cannot be normalized.
    """
    total = sum(weights) if normalize else 1.0
    assert total != 0, "weights that sum to 0"
    # Tensors read are not bound to a name: they would stay in memory while the next is read.
    source = iter(tensors)
    found = next(source).mul_(weights[0] / total)
    for weight in weights[1:]:
        found.add_(next(source), alpha=weight / total)
    return found


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """sin((1−t)Ω)/sin Ω · θ_1 + sin(tΩ)/sin Ω · θ_2, Ω the angle between the two as flat vectors. Writes into both.

    Where they are colinear (|cos Ω| over `COLINEAR`, or one of them 0) it is (1−t)·θ_1 + t·θ_2. Shoemake 1985,
    "Animating rotation with quaternion curves", section 3.3. t = 0 gives the first, t = 1 the second.
    """
    lengths = math.sqrt(_dot(first, first) * _dot(second, second))
    cosine = _dot(first, second) / lengths if lengths > 0 else 1.0
    if abs(cosine) > COLINEAR:
        return first.mul_(1 - t).add_(second, alpha=t)
    angle = math.acos(cosine)
    one, two = (math.sin(fraction * angle) / math.sin(angle) for fraction in (1 - t, t))
    return first.mul_(one).add_(second, alpha=two)


def elected(deltas: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """For each element the sign with the larger mass, sgn Σ w_i δ_i; then over those A of that sign Σ_A w_i δ_i,
    divided by Σ_A |w_i| with `normalize`: their mean. Writes into the first delta.

    Yadav et al. 2023, "TIES-Merging", section 3 (elect sign, disjoint merge). Where masses are equal, as half precision
    often makes them, the paper leaves the sign open; here it is plus: one change stays, not neither.
    """
    flat = [delta.view(-1) for delta in deltas]
    for start in range(0, flat[0].numel(), CHUNK):
        parts = [each[start : start + CHUNK] * weight for each, weight in zip(flat, weights, strict=True)]
        sign = torch.where(torch.stack(parts).sum(0) < 0, -1.0, 1.0)
        total, mass = torch.zeros_like(sign), torch.zeros_like(sign)
        for part, weight in zip(parts, weights, strict=True):
            agrees = (part.sign() == sign) & (part != 0)
            total += part * agrees
            mass += agrees * abs(weight)
        if normalize:
            total = torch.where(mass > 0, total / mass.clamp_min(1e-30), 0.0)
        flat[0][start : start + CHUNK] = total
    return deltas[0]


def model_stock(base: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """t·mean(θ_i) + (1−t)·θ_0 with t = N cos θ / (1 + (N−1) cos θ), θ the angle between deltas, cos θ its mean over the
    pairs. Writes into the deltas.

    Jang et al. 2024, "Model Stock: All we need is just a few fine-tuned models", equations 3 and 5. Deltas that point
    away from each other (cos θ < 0) count as being at right angles: t = 0, the base.
    """
    squares = [_dot(delta, delta) for delta in deltas]
    cosines = []
    for one, other in itertools.combinations(range(len(deltas)), 2):
        lengths = math.sqrt(squares[one] * squares[other])
        equal = float(squares[one] == squares[other])
        cosines.append(_dot(deltas[one], deltas[other]) / lengths if lengths > 0 else equal)
    cosine = min(1.0, max(0.0, sum(cosines) / len(cosines)))
    t = len(deltas) * cosine / (1 + (len(deltas) - 1) * cosine)
    return linear(deltas, [1.0] * len(deltas), normalize=True).mul_(t).add_(base)


def trim(delta: Tensor, density: float) -> Tensor:
    """δ with all except the fraction `density` of its elements of largest magnitude set to 0, in place; at least one
    stays.

    Yadav et al. 2023, section 3 (trim). Of equal magnitudes the first stay.
    """
    keep_largest(delta, max(1, round(density * delta.numel())))
    return delta


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """δ with each element kept with probability `density` and then divided by it, in place: its expectation is
    unchanged.

    Yu et al. 2024, "Language models are Super Mario", section 3.2 (DARE; its drop rate p is 1 − density).
    """
    for chunk in chunks(delta):
        keep = torch.rand(chunk.shape, generator=generator) < density
        chunk.mul_(keep).div_(density)
    return delta


def drop_by_rank(delta: Tensor, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
    """δ with element i dropped with probability p_i = (1 − density) − ε/2 + ε/n·r_i, r_i its rank in its row by falling
    magnitude (the largest: 0) and n the row's length, and kept ones divided by 1 − p_i, in place.

    Deep et al. 2024, "DELLA-Merging", section 3.1 (MAGPRUNE: ranks among the weights of one neuron, here the last
    dimension).
    """
    rows = delta.view(-1, delta.shape[-1] if delta.ndim else 1)
    length = rows.shape[1]
    least = (1 - density) - epsilon / 2
    step = max(1, CHUNK // length)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        order = part.abs().argsort(dim=1, descending=True, stable=True)
        positions = torch.arange(length, dtype=torch.float32).expand_as(part)
        ranks = torch.empty_like(part).scatter_(1, order, positions)
        probability = ranks.mul_(epsilon / length).add_(least)
        keep = torch.rand(part.shape, generator=generator) >= probability
        part.mul_(keep).div_(1 - probability)
    return delta


def breadcrumbs(delta: Tensor, drop_smallest: float, drop_largest: float) -> Tensor:
    """δ without given fractions of its elements of smallest and of largest magnitude, in place.

    Davari & Belilovsky 2023, "Model Breadcrumbs", section 3 (β: drop_smallest; 1 − γ: drop_largest).
    """
    total = delta.numel()
    largest = round(drop_largest * total)
    zero_largest(delta, largest)
    keep_largest(delta, max(0, total - largest - round(drop_smallest * total)))
    return delta


def _deltas(
    row: DeltaRow, tensors: Iterator[Tensor], base: Tensor, number: int, parameters: Parameters, draws: Draws | None
) -> Iterator[Tensor]:
    for index in range(number):
        yield _thinned(row, next(tensors).sub_(base), parameters, index, draws)


def _thinned(row: DeltaRow, delta: Tensor, parameters: Parameters, index: int, draws: Draws | None) -> Tensor:
    if row.thin == "trim":
        return trim(delta, parameters.density)
    if row.thin == "breadcrumbs":
        return breadcrumbs(delta, parameters.drop_smallest, parameters.drop_largest)
    if row.thin == "none":
        return delta
    assert draws is not None, "random numbers for a method that drops at random"
    if row.thin == "drop":
        return drop(delta, parameters.density, draws(index))
    return drop_by_rank(delta, parameters.density, parameters.epsilon, draws(index))


def _dot(one: Tensor, other: Tensor) -> float:
    """The inner product of two tensors as flat vectors, summed in fp64."""
    pairs = zip(chunks(one), chunks(other), strict=True)
    return sum(float(torch.dot(a.double(), b.double())) for a, b in pairs)
