"""Notes on a run of preference optimization: the chosen answers become less likely, and the pairs are memorized.

Input: the named means of every step and the metrics of every validation. Each note is made once a run; what follows
from it is the reader's choice, so that none ends a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loopos.config.figures import figure
from loopos.config.preference import KTO, PreferenceConfig
from loopos.rl.monitors import Alert

LIKELIHOOD, OVERFITTING = "likelihood", "overfitting"
# Nats of a response: it is then less likely by more than a factor of e.
_LIKELIHOOD_DROP = 1.0
_TRAINING_ACCURACY = 0.99
# Validations in a row that are worse than the best: one alone may be noise.
_PATIENCE = 2


class PreferenceMonitor:
    """Watches one run."""

    def __init__(self, config: PreferenceConfig) -> None:
        is_kto = config.computation.method == KTO
        self._likelihood = "logprob_desirable" if is_kto else "logprob_chosen"
        self._answers = "desirable" if is_kto else "chosen"
        self._advice = _advice(config)
        self._first: float | None = None
        self._best: dict[str, float] = {}
        self._worse = 0
        self._accuracy, self._steps = 0.0, 0
        self._noted: list[str] = []

    def step(self, means: Mapping[str, float]) -> None:
        """Takes the means of one optimizer step."""
        accuracy = means.get("accuracy", math.nan)
        if math.isfinite(accuracy):
            self._accuracy, self._steps = self._accuracy + accuracy, self._steps + 1

    def validation(self, metrics: Mapping[str, float]) -> list[Alert]:
        """Takes the metrics of one validation, the first of which is the baseline; returns new notes."""
        training = self._accuracy / self._steps if self._steps else math.nan
        self._accuracy, self._steps = 0.0, 0
        found = [self._of_likelihood(metrics), self._of_overfitting(metrics, training)]
        notes = [note for note in found if note is not None and note.name not in self._noted]
        self._noted += [note.name for note in notes]
        return notes

    def _of_likelihood(self, metrics: Mapping[str, float]) -> Alert | None:
        value = metrics.get(self._likelihood, math.nan)
        if not math.isfinite(value):
            return None
        if self._first is None:
            self._first = value
        limit = self._first - _LIKELIHOOD_DROP
        if value >= limit:
            return None
        message = (
            f"the {self._answers} answers became less likely: their log-probability is {figure(value)}, at first it "
            f"was {figure(self._first)} nats. This is usual: the loss rewards the gap to the other answers, not the "
            f"likelihood itself. {self._advice}"
        )
        return Alert(LIKELIHOOD, value, limit, message)

    def _of_overfitting(self, metrics: Mapping[str, float], training: float) -> Alert | None:
        accuracy, loss = (metrics.get(name, math.nan) for name in ("accuracy", "loss"))
        if not (math.isfinite(accuracy) and math.isfinite(loss)):
            return None
        best = self._best
        is_worse = bool(best) and (accuracy < best["accuracy"] or loss > best["loss"])
        self._worse = self._worse + 1 if is_worse else 0
        self._best = {
            "accuracy": max(accuracy, best.get("accuracy", -math.inf)),
            "loss": min(loss, best.get("loss", math.inf)),
        }
        if self._worse < _PATIENCE or not training >= _TRAINING_ACCURACY:
            return None
        message = (
            f"the policy memorizes the training rows: their accuracy is {figure(training)}, while in {self._worse} "
            f"validations accuracy or loss was worse than before (accuracy {figure(accuracy)}, best "
            f"{figure(self._best['accuracy'])}; loss {figure(loss)}, lowest {figure(self._best['loss'])}). "
            "training.early_stopping, fewer epochs, a lower learning rate or a larger preference.beta holds it"
        )
        return Alert(OVERFITTING, training, _TRAINING_ACCURACY, message)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON."""
        return {
            "first": self._first,
            "best": dict(self._best),
            "worse": self._worse,
            "training": [self._accuracy, self._steps],
            "noted": list(self._noted),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores `state`."""
        self._first, self._best, self._worse = state["first"], dict(state["best"]), state["worse"]
        self._accuracy, self._steps = state["training"]
        self._noted = list(state["noted"])


def _advice(config: PreferenceConfig) -> str:
    """What keeps the likelihood up."""
    if config.computation.method == KTO:
        return "A larger preference.desirable_weight or preference.beta holds it"
    if "sft" in config.losses:
        return f"A larger weight of sft in preference.loss (now {figure(config.losses['sft'])}) holds it"
    losses = ", ".join(f'"{name}": {weight:g}' for name, weight in {**config.losses, "sft": 1.0}.items())
    return f'The term sft holds it: "preference": {{"loss": {{{losses}}}}}'
