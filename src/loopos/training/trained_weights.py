"""Which weights train (now and later), in which format and on which device; and which weights a finished run exports.

`models.adapters` sets `requires_grad`; `precision.MasterWeights` keeps the fp32 master weights; `sharding` distributes
the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
    """The sparsity masks of a pruned model: name → mask (True = zero) of every matrix with zeros, except embeddings.

    They follow from the initial weights, so a resumed run computes the same masks. A matrix of only zeros is not
    pruned: new heads and adapters start as zeros. Biases and norms may contain zeros by chance.
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


@dataclass(frozen=True, eq=False)
class RowsThatTrain:
    """A matrix `[V, d]` of which only the rows in `mask`, bool `[V]`, train."""

    weight: nn.Parameter
    mask: Tensor


class TrainedWeights:
    """`now`: names of the parameters that train from the start. `later`: names that `unfreeze` adds."""

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSection,
        *,
        precision: str,
        device: torch.device,
        world: World = World(),
        initially_frozen: Sequence[nn.Parameter] = (),
        half_under: str | tuple[str, ...] = "",
        frozen: Sequence[nn.Module] = (),
        rows: Sequence[RowsThatTrain] = (),
    ) -> None:
        """half_under: with bf16, parameters whose names start with this take it; the others stay fp32. frozen: other
        models that do not train and keep their format. rows: matrices of which some rows train, which are frozen
        otherwise. Raises `UserError` for a sharding that is not possible.
        """
        for each in rows:
            each.weight.requires_grad_(True)
        named = dict(model.named_parameters())
        by_id = {id(each.weight): each.mask for each in rows}
        masks = {name: by_id[id(parameter)] for name, parameter in named.items() if id(parameter) in by_id}
        frozen_ids = {id(parameter) for parameter in initially_frozen}
        self.now = {name for name, parameter in named.items() if parameter.requires_grad}
        self.later: set[str] = set()
        if settings.unfreeze_step is not None:
            self.later = {name for name, parameter in named.items() if id(parameter) in frozen_ids}
        # Before casting: a smaller format could round a weight to zero.
        zeros = zeros_to_keep(model) if settings.keep_zeros else {}
        half = _half(precision, half_under)
        self._model, self._precision, self._device, self._world = model, precision, device, world
        self._trained = sum(
            int(masks[name].sum()) * named[name].shape[1] if name in masks else named[name].numel() for name in self.now
        )
        self._every = sum(parameter.numel() for parameter in named.values())
        self._needed = _bytes_of(model, self._trained) + sum(_bytes_of(each, 0) for each in frozen)
        self._sharding, self._shared = sharding_for(world, device, needed=self._needed, optimizer=settings.optimizer)
        self._put(frozen, half)
        self.master_weights = MasterWeights(
            dict(model.named_parameters()),
            may_train=self.now | self.later,
            half=half,
            sharding=self._sharding,
        )
        self.master_weights.keep_zeros(zeros)
        self.master_weights.train_rows(masks)
        self._zeros = sum(int(mask.sum()) for mask in zeros.values()) if settings.keep_zeros else None
        self.master_weights.set_training(self.now)
        dp_rank, _ = world.data_parallel
        if dp_rank > 0:
            # The model is equal on all ranks; random numbers drawn from here on, such as dropout masks, differ.
            seed_everything(settings.seed, dp_rank)

    def _put(self, frozen: Sequence[nn.Module], half: Callable[[str], torch.dtype | None]) -> None:
        for module in (self._model, *frozen):
            module.train()
            if self._sharding is None:
                module.to(self._device)
            elif module is self._model:
                self._sharding.shard(module, half)
            else:
                self._sharding.shard(module, lambda name: None)

    def unfreeze(self) -> None:
        """Trains the initially frozen parameters too."""
        self.master_weights.set_training(self.now | self.later)

    def summary(self) -> str:
        """One line: what trains, in which format and where."""
        zeros = f", {self._zeros:,} zeros stay zero" if self._zeros is not None else ""
        shared = f"; {self._shared}" if self._shared else ""
        return (
            f"trains {self._trained:,} of {self._every:,} parameters in {self._precision} on {self._device}{zeros}"
            f"{shared}"
        )

    def whole(self) -> AbstractContextManager[None]:
        """Within the context every process has all weights and may run the models without the others."""
        return nullcontext() if self._sharding is None else self._sharding.whole()

    def take_best(self, run_dir: Path, settings: TrainingSection) -> int | None:
        """Loads the weights of the best checkpoint and returns its step; returns None without one. Call on every
        process.
        """
        if not settings.keep_best:
            return None
        root = run_dir / "checkpoints"
        # Rank 0 decides after its last change to the folder; another rank might read a half-changed folder.
        best = checkpoint.best(root) if self._world.is_first else None
        name = self._world.gather(best and best.name)[0]
        if name is None:
            return None
        found = checkpoint.load(root / str(name))
        self.master_weights.load(found.tensors["weights"])
        return found.step

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, which writes."""
        return self._world.is_first

    def gather(self) -> bool:
        """Gathers the trained model on rank 0 after training. Returns whether this process is rank 0 and should write
        the model. Call on every process.
        """
        if self._sharding is not None:
            self._sharding.gather(self._model)
        return self._world.is_first


def _half(precision: str, under: str | tuple[str, ...]) -> Callable[[str], torch.dtype | None]:
    """Name of a parameter → bf16, or None to keep its format. Lengths of DoRA stay fp32: rounded ones would scale every
    output by up to 1 ± 2⁻⁹.
    """

    def half(name: str) -> torch.dtype | None:
        is_half = precision == "bf16" and name.startswith(under) and ".lora_magnitude_vector." not in name
        return torch.bfloat16 if is_half else None

    return half


def _bytes_of(model: nn.Module, trained: int) -> int:
    """Bytes of the weights, plus 12 per trained weight: an fp32 gradient and the two moments of Adam."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) + 12 * trained


def take_chosen(
    trained: TrainedWeights,
    run_dir: Path,
    settings: TrainingSection,
    result: FitResult,
    progress: RunProgress,
    *,
    callbacks: Callbacks,
    of_round: int | None = None,
    whole_run: Path | None = None,
) -> None:
    """Loads the best checkpoint's weights, or keeps the last weights if there is none, and reports which. Call on every
    process; rank 0 writes the event "export". of_round: the round of self-improvement that `run_dir` belongs to.
    whole_run: the folder of the run with all rounds, whose log also gets the event.
    """
    step = trained.take_best(run_dir, settings)
    kind, sentence = _described(step, result)
    progress.say(f"exporting {sentence}" + ("" if of_round is None else f", of round {of_round}"))
    if not trained.is_first:
        return
    taken = result.step if step is None else step
    logs: dict[Path, dict[str, JSON]] = {run_dir: {"weights": kind}}
    if whole_run is not None and of_round:
        logs[whole_run] = {"weights": kind, "round": of_round}
    for folder, metrics in logs.items():
        with EventLog(folder / "events.jsonl", callbacks or None) as log:
            log.write("export", step=taken, metrics=metrics, timing={})


def _described(step: int | None, result: FitResult) -> tuple[str, str]:
    """Kind and description of the weights of `step`; None means the last weights."""
    if step is None:
        reason = "" if result.best_trained_step is None else ": no checkpoint of the best validation was saved"
        return "last", f"the last weights{reason}"
    if step == 0:
        return "start", "the weights of the start (step 0): training did not beat them"
    if result.beat_start is False:
        return "best trained", f"the weights of step {step}, the best after the start: training did not beat the start"
    return "best", f"the best weights, of step {step}"
