"""Which of a model's weights train, now and later, in what format and on which device.

Enters: a model on the CPU with `requires_grad` set, what `freeze_layers` holds back, the format of training. Leaves:
the masters, and the model on the device in its format, shared out over the processes where that is asked for. Left out:
who set `requires_grad` (`models.adapters`), the masters (`precision`), how a model is shared out (`sharding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from loopos.config.sections import TrainingSection
from loopos.training import checkpoint
from loopos.training.distributed import World
from loopos.training.kept_zeros import zeros_to_keep
from loopos.training.precision import Masters
from loopos.training.random_states import seed_everything
from loopos.training.sharding import sharding_for


class TrainedWeights:
    """`now`: names that train from the start; `later`: those that `unfreeze` adds."""

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSection,
        *,
        precision: str,
        device: torch.device,
        world: World = World(),
        held_back: Sequence[nn.Parameter] = (),
        half_under: str | tuple[str, ...] = "",
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        """half_under: with bf16, parameters whose names begin so take it; the others stay in fp32. frozen: models
        beside it that do not train, in their format. Raises `UserError` for a sharding that is not to be had.
        """
        named = dict(model.named_parameters())
        held = {id(parameter) for parameter in held_back}
        self.now = {name for name, parameter in named.items() if parameter.requires_grad}
        self.later: set[str] = set()
        if settings.unfreeze_step is not None:
            self.later = {name for name, parameter in named.items() if id(parameter) in held}
        # Looked for before a smaller format could round a weight to zero.
        zeros = zeros_to_keep(model) if settings.keep_zeros else {}
        half = torch.bfloat16 if precision == "bf16" else None
        self._model, self._precision, self._device, self._world = model, precision, device, world
        self._trained = sum(named[name].numel() for name in self.now)
        self._every = sum(parameter.numel() for parameter in named.values())
        self._needed = _bytes_of(model, self._trained) + sum(_bytes_of(each, 0) for each in frozen)
        self._sharding, self._shared = sharding_for(world, device, needed=self._needed, optimizer=settings.optimizer)
        self._put(frozen, half_under, half)
        self.masters = Masters(
            dict(model.named_parameters()),
            may_train=self.now | self.later,
            half=lambda name: half if name.startswith(half_under) else None,
            sharding=self._sharding,
        )
        self.masters.keep_zeros(zeros)
        self._zeros = sum(int(mask.sum()) for mask in zeros.values()) if settings.keep_zeros else None
        self.masters.set_training(self.now)
        share, _ = world.share
        if share > 0:
            # The model is the same on all; what it draws from here on, such as dropout, is not.
            seed_everything(settings.seed, share)

    def _put(self, frozen: Sequence[nn.Module], half_under: str | tuple[str, ...], half: torch.dtype | None) -> None:
        for module in (self._model, *frozen):
            module.train()
            if self._sharding is None:
                module.to(self._device)
            elif module is self._model:
                self._sharding.cut(module, lambda name: half if name.startswith(half_under) else None)
            else:
                self._sharding.cut(module, lambda name: None)

    def unfreeze(self) -> None:
        """From now on what was held back trains too."""
        self.masters.set_training(self.now | self.later)

    def said(self) -> str:
        """What trains, in words."""
        kept = f", {self._zeros:,} zeros stay zero" if self._zeros is not None else ""
        shared = f"; {self._shared}" if self._shared else ""
        return (
            f"trains {self._trained:,} of {self._every:,} parameters in {self._precision} on {self._device}{kept}"
            f"{shared}"
        )

    def whole(self) -> AbstractContextManager[None]:
        """Within, each process holds all weights, and may run the models without the others."""
        return nullcontext() if self._sharding is None else self._sharding.whole()

    def take_best(self, run_dir: Path, settings: TrainingSection) -> int | None:
        """Loads the weights of the best checkpoint and returns its step; None, and nothing is loaded, without one. To
        be called on every process.
        """
        if not settings.keep_best:
            return None
        root = run_dir / "checkpoints"
        # The first process's word, which comes after its last change to the folder: another might look in the middle.
        best = checkpoint.best(root) if self._world.is_first else None
        name = self._world.gather(best and best.name)[0]
        if name is None:
            return None
        found = checkpoint.load(root / str(name))
        self.masters.load(found.tensors["weights"])
        return found.step

    def gather(self) -> bool:
        """The trained model becomes whole on the first process; training is over. Whether this process is that one, and
        is to write it. To be called on every process.
        """
        if self._sharding is not None:
            self._sharding.gather(self._model)
        return self._world.is_first


def _bytes_of(model: nn.Module, trained: int) -> int:
    """Weights as they are, and of each that trains an fp32 gradient and the two moments of Adam."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) + 12 * trained
