"""How a model is to generate: what it can be served by, found by running it.

Enters: a loaded causal language model. Leaves: whether rows may decode together over our cache, and whether with the
weights in the kernel's layout; each is taken where it gives the logits of every sequence run alone. Left out: the rows
(`rows.py`), the layout (`kernel_layout.py`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from loopos.generation.cache import IMPLEMENTATION
from loopos.generation.kernel_layout import kernel_layout
from loopos.generation.rows import FEW_ROWS, PLAIN, CachedRows, PlainRows, serving
from loopos.models.attention import PackedUnsupported
from loopos.models.quantized import exact_activations

_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})
# Frequencies that change with the longest row of the batch: a row's text would depend on its neighbours.
_BATCH_DEPENDENT_ROTARY = frozenset({"dynamic", "longrope"})
# At least four tokens each.
_PROBE_LENGTHS = (6, 10, 4, 8)
# Largest difference of logits, relative to the largest logit: kernels round differently for different shapes.
_PROBE_TOLERANCE = {torch.float32: 2e-4, torch.float64: 2e-4, torch.bfloat16: 0.06, torch.float16: 0.02}


@dataclass(frozen=True)
class Road:
    """How a model is to generate. `why_plain`: why `CachedRows` cannot serve it, in words; empty where it can.
    `kernel_layout`: whether it gives the same logits with its weights in the kernel's layout. `own_cache`: whether the
    model's own cache, which rows that run one by one use, gives the logits of a whole pass.
    """

    why_plain: str
    kernel_layout: bool = False
    own_cache: bool = True

    def layout(self, model: PreTrainedModel, num_rows: int) -> AbstractContextManager[None]:
        """The weights as rows that decode together want them: a few are as fast with the weights as they lie."""
        return kernel_layout(model) if self.kernel_layout and num_rows > FEW_ROWS else nullcontext()


def probed(model: PreTrainedModel) -> Road:
    """Runs some sequences on these weights: the cached road is taken where it gives the logits of each run alone, and
    the kernel's layout where it does so too.
    """
    with exact_activations(model):
        road = _probed(model)
        return replace(road, own_cache=_own_cache_is_exact(model)) if road.why_plain else road


def _probed(model: PreTrainedModel) -> Road:
    unserved = _unserved(model.config.get_text_config())
    if unserved:
        return Road(unserved)
    draw, vocabulary = random.Random(0), model.config.get_text_config().vocab_size
    first = min(3, vocabulary - 1)
    sequences = [[draw.randrange(first, vocabulary) for _ in range(length)] for length in _PROBE_LENGTHS]
    with serving(model, PLAIN):
        alone = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -4:] for ids in sequences]
    expected = torch.cat(alone).float()
    difference = _difference(model, sequences, expected)
    if difference or model.device.type != "cpu" or model.dtype is not torch.bfloat16:
        return Road(difference)
    with kernel_layout(model):
        return Road("", kernel_layout=not _difference(model, sequences, expected))


def _difference(model: PreTrainedModel, sequences: Sequence[list[int]], expected: Tensor) -> str:
    """What speaks against `CachedRows`, in words."""
    try:
        with serving(model, IMPLEMENTATION):
            together = _probe(model, sequences)
    except (PackedUnsupported, ValueError, TypeError, AssertionError, RuntimeError) as problem:
        return (str(problem).splitlines() or [type(problem).__name__])[0]
    difference = float((together.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    tolerance = _PROBE_TOLERANCE.get(model.dtype, 0.06)
    return "" if difference <= tolerance else f"its logits differ from each row alone by {difference:.1e}"


def _own_cache_is_exact(model: PreTrainedModel) -> bool:
    """Whether a prompt and two more tokens give, over the cache that the model returns, the logits of whole passes."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = [number % vocabulary for number in range(3, 3 + _PROBE_LENGTHS[0])]
    with serving(model, PLAIN):
        whole = [
            model(input_ids=torch.tensor([ids[:end]], device=model.device)).logits[0, -1] for end in (-2, -1, None)
        ]
        rows = PlainRows(model, 1)
        try:
            found = [rows.extend([0], [ids[:-2]])[0], rows.step(ids[-2:-1])[0], rows.step(ids[-1:])[0]]
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError):
            return False
    expected = torch.stack(whole).float()
    difference = (torch.stack(found).float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    return bool(difference <= _PROBE_TOLERANCE.get(model.dtype, 0.06))


def _unserved(config: PreTrainedConfig) -> str:
    """What the configuration asks for that the cache cannot give, in words."""
    layers = set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYERS
    if layers:
        return f"its layers use {', '.join(sorted(layers))}"
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rotary, *rotary.values()) if isinstance(part, dict)}
    moving = kinds & _BATCH_DEPENDENT_ROTARY
    if moving:
        return f"its rotary positions ({', '.join(sorted(moving))}) depend on the longest row of a batch"
    return ""


def _probe(model: PreTrainedModel, sequences: Sequence[list[int]]) -> Tensor:
    """Logits after each of every sequence's last four tokens, `[4N, V]`: all but three packed, the next two in steps,
    the last as a continuation.
    """
    rows = CachedRows(model, len(sequences))
    every = range(len(sequences))
    parts = [rows.extend(every, [ids[:-3] for ids in sequences])]
    parts += [rows.step([ids[place] for ids in sequences]) for place in (-3, -2)]
    parts.append(rows.extend(every, [ids[-1:] for ids in sequences]))
    return torch.stack(parts, 1).flatten(0, 1)
