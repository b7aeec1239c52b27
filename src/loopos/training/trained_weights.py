"""Which of a model's weights train, now and later, and in what format.

Enters: a model with `requires_grad` set, what `freeze_layers` holds back, the format of training. Leaves: the masters,
and the model in its format. Left out: who set `requires_grad` (`models.adapters`), the masters (`precision`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from loopos.config.sections import TrainingSection
from loopos.training import checkpoint
from loopos.training.kept_zeros import zeros_to_keep
from loopos.training.precision import Masters


class TrainedWeights:
    """`now`: names that train from the start; `later`: those that `unfreeze` adds."""

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSection,
        *,
        precision: str,
        held_back: Sequence[nn.Parameter] = (),
        half_under: str | tuple[str, ...] = "",
    ) -> None:
        """half_under: with bf16, parameters whose names begin so take it; the others stay in fp32."""
        named = dict(model.named_parameters())
        held = {id(parameter) for parameter in held_back}
        self.now = {name for name, parameter in named.items() if parameter.requires_grad}
        self.later: set[str] = set()
        if settings.unfreeze_step is not None:
            self.later = {name for name, parameter in named.items() if id(parameter) in held}
        # Looked for before a smaller format could round a weight to zero.
        zeros = zeros_to_keep(model) if settings.keep_zeros else {}
        half = torch.bfloat16 if precision == "bf16" else None
        self.masters = Masters(
            named,
            may_train=self.now | self.later,
            half=lambda name: half if name.startswith(half_under) else None,
        )
        self.masters.keep_zeros(zeros)
        self._zeros = sum(int(mask.sum()) for mask in zeros.values()) if settings.keep_zeros else None
        self.masters.set_training(self.now)
        self._trained = sum(named[name].numel() for name in self.now)
        self._every = sum(parameter.numel() for parameter in named.values())
        self._precision, self._device = precision, next(model.parameters()).device

    def unfreeze(self) -> None:
        """From now on what was held back trains too."""
        self.masters.set_training(self.now | self.later)

    def said(self) -> str:
        """What trains, in words."""
        kept = f", {self._zeros:,} zeros stay zero" if self._zeros is not None else ""
        return f"trains {self._trained:,} of {self._every:,} parameters in {self._precision} on {self._device}{kept}"

    def take_best(self, run_dir: Path, settings: TrainingSection) -> int | None:
        """Loads the weights of the best checkpoint and returns its step; None, and nothing is loaded, without one."""
        best = checkpoint.best(run_dir / "checkpoints") if settings.keep_best else None
        if best is None:
            return None
        found = checkpoint.load(best)
        self.masters.load(found.tensors["weights"])
        return found.step
