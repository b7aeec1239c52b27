"""The zeros of a pruned model, which training keeps.

Enters: a model as it was loaded. Leaves: masks of its weights, True = zero, and to stay so. They follow from the
weights that a run begins with, so a resumed run finds the same. Left out: applying them (`precision.MasterWeights`).

Which of a model's weights train, now and later, in what format and on which device.

Enters: a model on the CPU with `requires_grad` set, what `freeze_layers` holds back, the format of training. Leaves:
the masters, and the model on the device in its format, shared out over the processes where that is asked for. Left out:
who set `requires_grad` (`models.adapters`), the masters (`precision`), how a model is shared out (`sharding`).

Which weights of a finished run are exported, for every method alike.

Enters: the trained weights, the run's folder and its result. Leaves: the weights loaded, a sentence, and an event
"export" by which reports name them. Left out: writing the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from loopos.config.sections import TrainingSection
from loopos.storage.durable import JSON
from loopos.storage.events import EventLog
from loopos.training import checkpoint
from loopos.training.callbacks import Callbacks
from loopos.training.distributed import World
from loopos.training.precision import MasterWeights
from loopos.training.progress import RunProgress
from loopos.training.random_states import seed_everything
from loopos.training.run_state import FitResult
from loopos.training.sharding import sharding_for


def zeros_to_keep(model: nn.Module) -> dict[str, Tensor]:
    """By the parameter's name the zeros of every matrix that has some, embeddings left out.

    A matrix of zeros alone is no pruned one: new heads and adapters begin so. Biases and norms may be zero by chance.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or id(parameter) in embeddings:
            continue
        zeros = parameter.detach() == 0
        if zeros.any() and not zeros.all():
            masks[name] = zeros
    return masks


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
        self.master_weights = MasterWeights(
            dict(model.named_parameters()),
            may_train=self.now | self.later,
            half=lambda name: half if name.startswith(half_under) else None,
            sharding=self._sharding,
        )
        self.master_weights.keep_zeros(zeros)
        self._zeros = sum(int(mask.sum()) for mask in zeros.values()) if settings.keep_zeros else None
        self.master_weights.set_training(self.now)
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
        self.master_weights.set_training(self.now | self.later)

    def summary(self) -> str:
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
        self.master_weights.load(found.tensors["weights"])
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


def take_chosen(
    trained: TrainedWeights,
    run_dir: Path,
    settings: TrainingSection,
    result: FitResult,
    world: World,
    progress: RunProgress,
    *,
    callbacks: Callbacks,
    of_round: int | None = None,
    whole_run: Path | None = None,
) -> None:
    """Loads the best checkpoint's weights, or leaves the last in place where none was kept; says which. To be called on
    every process; the first writes the event. of_round: the round of self-improvement whose folder `run_dir` is, and
    whole_run: the folder of the run that has several, whose log names the round.
    """
    step = trained.take_best(run_dir, settings)
    kind, sentence = _described(step, result)
    progress.say(f"exporting {sentence}" + ("" if of_round is None else f", of round {of_round}"))
    if not world.is_first:
        return
    taken = result.step if step is None else step
    logs: dict[Path, dict[str, JSON]] = {run_dir: {"weights": kind}}
    if whole_run is not None and of_round:
        logs[whole_run] = {"weights": kind, "round": of_round}
    for folder, metrics in logs.items():
        with EventLog(folder / "events.jsonl", callbacks or None) as log:
            log.write("export", step=taken, metrics=metrics, timing={})


def _described(step: int | None, result: FitResult) -> tuple[str, str]:
    """Kind and description of the weights of `step`, None for the last."""
    if step is None:
        reason = "" if result.best_trained_step is None else ": no checkpoint of the best validation was kept"
        return "last", f"the last weights{reason}"
    if step == 0:
        return "start", "the weights of the start (step 0): training did not beat them"
    if result.beat_start is False:
        return "best trained", f"the weights of step {step}, the best after the start: training did not beat the start"
    return "best", f"the best weights, of step {step}"
