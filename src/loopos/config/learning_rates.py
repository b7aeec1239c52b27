"""The usual learning rates of what a run trains, and notes on rates outside them.

One table for all methods; `config.checks` has the other checks across keys, and every method's config asks here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

from loopos.config.sections import SizesSection, TrainingSection

Trained: TypeAlias = Literal["model", "reward model", "policy", "new model", "value model"]


class RatedConfig(Protocol):
    """What `rate_notes` reads of a method's config."""

    @property
    def model(self) -> SizesSection: ...
    @property
    def training(self) -> Any: ...
    @property
    def data(self) -> Any: ...


_LORA = (1e-5, 2e-3)
_HEAD = (1e-4, 1e-2)
USUAL_RATES: Mapping[tuple[Trained, str], tuple[float, float]] = {
    # Devlin et al. 2019: 2e-5 to 5e-5; Ouyang et al. 2022: 9.65e-6; SmolLM2 of 135M parameters: 1e-3.
    ("model", "all"): (1e-6, 1e-3),
    # Hu et al. 2021: 2e-4 to 5e-4; Dettmers et al. 2023: 1e-4 to 2e-4; about ten times the rate of full fine-tuning.
    ("model", "lora"): _LORA,
    # A linear layer on fixed features has no pretrained weights to lose.
    ("model", "head"): _HEAD,
    # Stiennon et al. 2020: 1.5e-5; Ouyang et al. 2022: 9e-6; Touvron et al. 2023: 5e-6 to 1e-5.
    ("reward model", "all"): (1e-6, 1e-4),
    ("reward model", "lora"): _LORA,
    ("reward model", "head"): _HEAD,
    # Ziegler et al. 2019: 7e-7 to 1e-5; Ouyang et al. 2022: 9.65e-6; Touvron et al. 2023: 1e-6.
    ("policy", "all"): (1e-7, 1e-4),
    ("policy", "lora"): (1e-6, 1e-3),
    ("value model", "all"): (1e-7, 1e-3),
    # Brown et al. 2020: 6e-5 to 6e-4, falling with size; small models take more.
    ("new model", "all"): (1e-5, 1e-2),
}
"""(what trains, `training.trainable`) → lowest and highest usual peak rate with Adam, whose step is about the rate."""

OTHER_OPTIMIZERS: Mapping[str, tuple[float, float]] = {"sgd": (1e-4, 1.0), "muon": (1e-4, 0.1)}
"""Optimizers whose step has another size than Adam's → their range, whatever trains. SGD's step is the rate times a
gradient that is clipped to 1 by default; muon's has the size of its matrix (Jordan et al. 2024: 0.02)."""

DESTRUCTIVE_RATES: Mapping[str, float] = {"sgd": 10.0, "muon": 1.0, "adam": 0.1, "adamw": 0.1, "adafactor": 0.1}
"""Rates above which training destroys the weights."""

_NARROW = 512
"""Width (features) up to which models take more than the highest rate of the table."""

_NAMES = {"all": "full training", "lora": "LoRA", "head": "a head"}


def rate_notes(config: RatedConfig, of: Trained = "model", *, has_head: bool = False) -> list[str]:
    """A note for each learning rate outside the usual range. of: what the method trains; has_head: whether it has a
    head with a rate of its own.
    """
    training: TrainingSection = config.training
    trainable, head_rate = training.trainable, training.head_learning_rate if has_head else None
    value_rate: float | None = getattr(training, "value_learning_rate", None)
    rates: list[tuple[str, float, Trained, str]] = []
    if trainable != "head" or head_rate is None:
        rates.append(("learning_rate", training.learning_rate, of, trainable))
    if head_rate is not None:
        rates.append(("head_learning_rate", head_rate, of, "head"))
    if value_rate is not None:
        rates.append(("value_learning_rate", value_rate, "value model", "all"))
    factor = _factor_of_width(_width(config))
    notes = (_note(f"training.{name}", rate, training.optimizer, what, how, factor) for name, rate, what, how in rates)
    return [note for note in notes if note]


def _note(key: str, rate: float, optimizer: str, of: Trained, trainable: str, factor: float) -> str:
    """The note on one rate; empty within the usual range. factor: on the highest rate of full training."""
    low, high = OTHER_OPTIMIZERS.get(optimizer) or USUAL_RATES.get((of, trainable)) or USUAL_RATES["model", trainable]
    high *= factor if trainable == "all" else 1.0
    what = f"{_NAMES[trainable]} of a {of}" if trainable != "head" else _NAMES[trainable]
    usually = f"the usual range for {what} with {optimizer} ({low:g} to {high:.3g})"
    if rate > DESTRUCTIVE_RATES[optimizer]:
        return f"{key} {rate:g} is far above {usually}: the weights will very likely be destroyed"
    if rate > high:
        return f"{key} {rate:g} is above {usually}: training may be unstable, or undo what the weights know"
    return f"{key} {rate:g} is below {usually}: the weights may hardly change" if rate < low else ""


def _factor_of_width(width: int | None) -> float:
    """How much higher the highest rate of a narrow model is: it goes as 1 / width (Yang et al. 2022, table 3)."""
    return 1.0 if width is None else max(1.0, _NARROW / width)


def _width(config: RatedConfig) -> int | None:
    """The width of the hidden states, from the config or a local model folder; None where neither has it."""
    if config.model.d_model is not None:
        return config.model.d_model
    file = os.path.join(str(getattr(config.data, "pretrained_weights", "")).replace("\0", ""), "config.json")
    try:
        with open(file, encoding="utf-8") as opened:
            described = json.load(opened)
    except (OSError, ValueError):
        # No folder, or a broken one, which opening the weights reports.
        return None
    width = described.get("hidden_size") if isinstance(described, dict) else None
    return width if isinstance(width, int) and width > 0 else None
