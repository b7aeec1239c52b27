"""The skeleton of a training run, which every method fills in.

    session → claim the folder → load_data → build_model → build_fit → fit.open → fit.run → export

A method overrides `load_data`, `build_model`, `build_fit`, `validate` and `write_model`; whoever reads its file reads
its whole run. The loop itself is `training.fit`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

from loopos.config.differences import resumed_config
from loopos.config.sections import LoraSection
from loopos.data.tokens import longest
from loopos.evaluation.own_metrics import OwnMetrics
from loopos.evaluation.report import write_report
from loopos.evaluation.run_claim import claim
from loopos.models.backbone import Backbone
from loopos.models.load import Pretrained, Sizes, load_pretrained
from loopos.models.new_tokens import embedding_weights, new_rows, with_new_tokens
from loopos.storage.durable import explain_disk_full
from loopos.training.callbacks import Callbacks, preserve_random_states
from loopos.training.distributed import World
from loopos.training.fit import Fit, RunSetup
from loopos.training.precision import resolve
from loopos.training.progress import RunProgress
from loopos.training.run_state import FitResult
from loopos.training.session import session
from loopos.training.trained_weights import RowsThatTrain, TrainedWeights, take_chosen
from loopos.training.update import Update, build_update
from loopos.training.validation import Validation

ConfigT = TypeVar("ConfigT", bound=Any)
Direction = Literal["min", "max"]


@dataclass(eq=False)
class Trainer(ABC, Generic[ConfigT]):
    """One run of one method: `Trainer(config).train()`.

    `environment`: settings of the process by name, for the log. `callbacks`, `metrics`: functions of the user.
    """

    config: ConfigT
    _: KW_ONLY
    progress: RunProgress = field(default_factory=RunProgress)
    trust_remote_code: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    callbacks: Callbacks = field(default_factory=Callbacks)
    metrics: OwnMetrics = field(default_factory=OwnMetrics)
    world: World = field(default=World(), init=False)
    device: torch.device = field(default=torch.device("cpu"), init=False)
    precision: str = field(default="fp32", init=False)
    trained: TrainedWeights = field(init=False, repr=False)
    fit: Fit[Any] = field(init=False, repr=False)
    result: FitResult = field(init=False)

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.config.data.output_dir)

    def train(self, *, resume: bool = False) -> FitResult:
        """Runs to the end and exports the model. Raises `UserError` for a mistake of the user; without `resume` nothing
        of an earlier run is overwritten.
        """
        with (
            session(self.config.training, self.config.distributed) as (self.device, self.world),
            claim(self.run_dir, self.world, resume=resume, note=self.progress.warn),
        ):
            self.config = resumed_config(self.config, self.run_dir)
            self.load_data()
            self.build_model()
            with self.running():
                self.result = self.run_fit(resume=resume)
            if not self.result.interrupted:
                self.export()
            self.world.wait()
        return self.result

    @abstractmethod
    def load_data(self) -> Any:
        """Reads and tokenizes the rows and opens the pretrained weights; prints what was decided."""

    @abstractmethod
    def build_model(self) -> Any:
        """Builds the model, chooses what trains and in which number format; sets `trained`."""

    @abstractmethod
    def build_fit(self) -> Fit[Any]:
        """Optimizer, update, batches, objective and loop; most of them through `fit_of`."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """The metrics of the validation rows, by name."""

    @abstractmethod
    def exported(self) -> nn.Module:
        """The module that `write_model` writes."""

    @abstractmethod
    def write_model(self) -> None:
        """Writes the chosen weights; called on the first process only. Raises `DiskFull`."""

    def running(self) -> AbstractContextManager[Any]:
        """What is open while the loop runs."""
        return nullcontext()

    def run_fit(self, *, resume: bool) -> FitResult:
        """The loop, from the newest checkpoint with `resume`."""
        self.fit = self.build_fit()
        self.fit.open(resume=resume)
        return self.fit.run()

    def load_pretrained(self, *, causal: bool = False) -> Pretrained:
        """The pretrained weights and their tokenizer, as `data.pretrained_weights`, `data.adapter` and
        `model` name them.
        """
        config = self.config
        found = load_pretrained(
            config.data.pretrained_weights,
            causal=causal,
            sizes=Sizes.of(config.model, max_length=config.training.max_length),
            tokenizer=config.data.tokenizer,
            trust_remote_code=self.trust_remote_code,
            adapter=getattr(config.data, "adapter", None),
        )
        return with_new_tokens(found, *self._new_tokens) if any(self._new_tokens) else found

    @property
    def _new_tokens(self) -> tuple[list[str], list[str]]:
        """Plain and special tokens that are added."""
        data = self.config.data
        return getattr(data, "new_tokens", []), getattr(data, "new_special_tokens", [])

    def rows_that_train(self, pretrained: Pretrained) -> list[RowsThatTrain]:
        """Under LoRA, the rows of new tokens in the embeddings: they train, and nothing else of these weights."""
        if self.lora is None or not any(self._new_tokens):
            return []
        plain, special = self._new_tokens
        mask = new_rows(pretrained.model, pretrained.tokenizer, [*plain, *special])
        return [RowsThatTrain(weight, mask) for weight in embedding_weights(pretrained.model)]

    def longest_of(self, pretrained: Pretrained) -> int | None:
        """The most tokens of a row: `training.max_length`, or the limit of the model."""
        positions = getattr(pretrained.model.config.get_text_config(), "max_position_embeddings", None)
        return longest(pretrained.tokenizer, positions, self.config.training.max_length)

    def choose_precision(self) -> str:
        """Sets and returns the number format of forward and backward passes."""
        self.precision = resolve(self.config.training.precision, self.device)
        return self.precision

    def print_attention(self, backbone: Backbone) -> None:
        """Prints which attention path the model takes, and why."""
        self.progress.say(f"attention: {backbone.path}" + (f" ({backbone.reason})" if backbone.reason else ""))

    def train_weights(self, model: nn.Module, **choices: Any) -> TrainedWeights:
        """Sets `trained`: the weights of `model` that the optimizer trains. choices: as `TrainedWeights` takes them."""
        self.trained = TrainedWeights(
            model,
            self.config.training,
            precision=self.precision,
            device=self.device,
            world=self.world,
            **choices,
        )
        return self.trained

    def update_of(self, model: nn.Module, *, head: set[str] | tuple[str, ...] = (), settings: Any = None) -> Update:
        """The optimizer's step. head: names of parameters that train at `training.head_learning_rate`. settings: other
        ones than the config's.
        """
        chosen = self.config.training if settings is None else settings
        return build_update(model, self.trained.master_weights, chosen, self.precision, self.world, head=head)

    def fit_of(self, *, run_dir: Path | None = None, facts: Mapping[str, Any] | None = None, **parts: Any) -> Fit[Any]:
        """The loop with what every method passes it alike. run_dir: the run's folder when None. facts: for the log, in
        addition to precision and environment. parts: the other arguments of `Fit`.
        """
        setup = RunSetup(
            run_dir=run_dir or self.run_dir,
            config=self.config,
            settings=self.config.training,
            progress=self.progress,
            callbacks=self.callbacks,
            world=self.world,
            facts={**(facts or {}), "precision": self.precision, "environment": self.environment},
            unfreeze=self.trained.unfreeze if self.trained.later else None,
        )
        return Fit(setup, **parts)

    def watched(self, default: str) -> tuple[str, str]:
        """The metric that chooses the best checkpoint, and the one that early stopping watches."""
        settings = self.config.training
        metric: str = settings.metric or default
        early = settings.early_stopping
        return metric, (early.metric if early is not None else None) or metric

    def validation_of(
        self,
        metrics: tuple[str, str],
        known: Mapping[str, Direction],
        *,
        num_rows: int,
        digest: str,
    ) -> Validation:
        """The validation that the loop calls. metrics: as `watched` returns them; known: directions of the method's own
        metrics; digest: of the validation rows.
        """
        best, stops = (self.metrics.direction(name, known) for name in metrics)
        return Validation(self.validate, metrics[0], best, metrics[1], stops, num_rows, digest, self.metrics.directions)

    def generates_now(self) -> bool:
        """Whether this validation generates answers, by `evaluation.every`: counted by the step, so that a resumed run
        generates at the same validations.
        """
        settings, position = self.config.training, self.fit.position
        every = settings.validate_every
        number = position.cursor.epoch if isinstance(every, str) else position.step // every
        is_due: bool = position.step >= self.fit.total_steps or number % self.config.evaluation.every == 0
        return is_due

    def with_own_metrics(self, metrics: Mapping[str, float], predictions: Any, targets: Any) -> dict[str, float]:
        """`metrics` and those of the user's functions, the same on every process."""
        with preserve_random_states():
            return self.metrics.added(
                metrics, predictions, targets, is_first=self.world.is_first, gather=self.world.gather
            )

    def export(self) -> None:
        """Takes the best weights, or the last where none is known as best, and writes model and report. Every process
        takes part; the first one writes. Raises `DiskFull`; the checkpoints of the run are whole then.
        """
        self.take_weights()
        self.before_writing()
        if not self.trained.gather():
            return
        needed_bytes = 4 * sum(parameter.numel() for parameter in self.exported().parameters())
        with explain_disk_full(self.run_dir, needed_bytes, "the trained model"):
            self.write_model()
            self.write_reports()
        for line in self.export_summary():
            self.progress.say(line)

    def take_weights(self) -> None:
        """Loads the weights that are exported."""
        take_chosen(
            self.trained,
            self.run_dir,
            self.config.training,
            self.result,
            self.progress,
            callbacks=self.callbacks,
        )

    def before_writing(self) -> None:
        """Computes what the exported model needs to know, on every process."""

    def write_reports(self) -> None:
        """Writes the report of the run."""
        write_report(self.run_dir)

    def export_summary(self) -> list[str]:
        """Lines that name what was written."""
        return [f"model: {self.run_dir / 'model'} · report: {self.run_dir / 'report.md'}"]

    @property
    def lora(self) -> LoraSection | None:
        """The adapters that train, if any."""
        settings = self.config.training
        return (settings.lora or LoraSection()) if settings.trainable == "lora" else None

    def description(self) -> dict[str, Any]:
        """What the model folder records of every method."""
        return {
            "precision": "bf16" if self.precision == "bf16" else "fp32",
            "pretrained_weights": os.path.basename(self.config.data.pretrained_weights.rstrip("/")),
        }
