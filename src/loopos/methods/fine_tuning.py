"""Fine-tuning: a head over pooled hidden states, trained through the whole transformer.

    tokens → hidden states → pool → head → loss → gradients → update

Enters: a `FineTuningConfig`. Leaves: a run folder with checkpoints, events, a report and the trained model. After
Devlin et al. 2019 (section 3.2) and Hu et al. 2021 (LoRA). Left out: the loop (`training.fit`), the reading of data
(`data.labelled`), what is done with the model afterwards (`evaluation.predictor`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from loopos.config.differences import as_begun
from loopos.config.fine_tuning import FineTuningConfig
from loopos.data.batches import Batch, PackedRows, StepBatches
from loopos.data.digest import rows_digest
from loopos.data.formats import ROLES
from loopos.data.labelled import LabelledData, check_for_task, load_labelled
from loopos.data.reading import account
from loopos.data.targets import targets_of
from loopos.data.tokens import Encoded, TokenReport, encode_labelled, longest
from loopos.evaluation.metrics import METRIC_DIRECTION
from loopos.evaluation.outputs import Meaning, confusion, interpret, measure, outputs_of, residual_points
from loopos.evaluation.own_metrics import OwnMetrics
from loopos.evaluation.report import write_report
from loopos.evaluation.run_claim import claim
from loopos.models.adapters import merge_lora, save_lora, set_trained
from loopos.models.backbone import Backbone
from loopos.models.folders import save_task_model
from loopos.models.heads import PooledModel
from loopos.models.load import Pretrained, Sizes, load_pretrained
from loopos.models.task_layout import default_pooling, how_it_opens
from loopos.storage.durable import explain_disk_full
from loopos.storage.events import EventLog
from loopos.training.callbacks import Callbacks, preserve_random_states
from loopos.training.distributed import World
from loopos.training.fit import Fit
from loopos.training.identity import of_task
from loopos.training.objectives import TaskObjective, task_objective, with_router_loss
from loopos.training.precision import resolve
from loopos.training.progress import RunProgress
from loopos.training.run_state import FitResult
from loopos.training.session import session
from loopos.training.trained_weights import TrainedWeights, take_chosen
from loopos.training.update import build_update
from loopos.training.validation import Validation

_MAIN_METRIC = {"classification": "accuracy", "multi_label": "micro_f1", "regression": "mae"}


@dataclass(eq=False)
class FineTuner:
    """Adapts a pretrained language model to a task: `FineTuner(config).train()`.

    `environment`: settings of the process, by name, for the log. `callbacks`, `metrics`: the user's own functions.
    """

    config: FineTuningConfig
    _: KW_ONLY
    progress: RunProgress = field(default_factory=RunProgress)
    trust_remote_code: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    callbacks: Callbacks = field(default_factory=Callbacks)
    metrics: OwnMetrics = field(default_factory=OwnMetrics)
    world: World = field(default=World(), init=False)

    @property
    def run_dir(self) -> Path:
        return Path(self.config.data.output_dir)

    def train(self, *, resume: bool = False) -> FitResult:
        """Data, model, update, fit, export, report. Raises `UserError` for a mistake of the user's; nothing of an
        earlier run is overwritten without `resume`.
        """
        with (
            session(self.config.training, self.config.distributed) as (self.device, self.world),
            claim(self.run_dir, self.world, resume=resume, note=self.progress.warn),
        ):
            self.config = as_begun(self.config, self.run_dir)
            self.load_data()
            self.build_model()
            fit = self.build_fit(self.world)
            fit.open(resume=resume)
            self.result = fit.run()
            if not self.result.interrupted:
                self.export()
            self.world.wait()
        return self.result

    def load_data(self) -> tuple[Pretrained, LabelledData]:
        """Reads, splits and tokenises the rows; says what was decided."""
        config, section = self.config, self.config.model
        self.data = load_labelled(config.data, section, seed=config.training.seed)
        check_for_task(config, self.data.space)
        self.pretrained = load_pretrained(
            config.data.pretrained_weights,
            sizes=Sizes.of(section, max_length=config.training.max_length),
            tokenizer=config.data.tokenizer,
            trust_remote_code=self.trust_remote_code,
        )
        positions = getattr(self.pretrained.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = longest(self.pretrained.tokenizer, positions, config.training.max_length)
        self.train_rows, self.train_tokens = self._encode(self.data.train)
        self.validation_rows, self.validation_tokens = self._encode(self.data.validation)
        self.targets = targets_of(self.data, scaling=section.target_scaling)
        self.pooling = section.pooling if section.pooling != "auto" else default_pooling(self.pretrained.model.config)
        # What "auto" came to is what the run is known by, and resumed with.
        resolved = section.model_copy(update={"pooling": self.pooling})
        self.config = config.model_copy(update={"model": resolved})
        for sentence in [self.pretrained.summary, *self.data.summary, f"tokens: {self.train_tokens.summary()}"]:
            self.progress.say(sentence)
        plain = self.pooling == "last" == default_pooling(self.pretrained.model.config) and self.targets.mean == 0
        how = "as it is" if plain else "with trust_remote_code=True only"
        self.progress.say(f"pooling: {self.pooling}; transformers will open the trained model {how}")
        if self.validation_rows:
            self.progress.say(f"validation tokens: {self.validation_tokens.summary()}")
        return self.pretrained, self.data

    def _encode(self, examples: Sequence[Any]) -> tuple[list[Encoded], TokenReport]:
        return encode_labelled(
            self.pretrained.tokenizer,
            examples,
            max_length=self.max_length,
            on_truncation=self.config.data.on_truncation,
        )

    def build_model(self) -> PooledModel:
        """Backbone and head, what trains, and the number format."""
        settings, section = self.config.training, self.config.model
        self.precision = resolve(settings.precision, self.device)
        self.backbone = backbone = Backbone(self.pretrained.model, attention=section.attention)
        self.progress.say(f"attention: {backbone.path}" + (f" ({backbone.reason})" if backbone.reason else ""))
        initially_frozen = set_trained(backbone.model, settings)
        if settings.gradient_checkpointing:
            backbone.model.activation_checkpointing_enable()
        outputs = self.data.space.num_outputs
        self.model = PooledModel(
            backbone,
            num_outputs=outputs,
            pooling=self.pooling,
            seed=settings.seed,
            head_std=section.head_init_std,
        )
        self.trained = TrainedWeights(
            self.model,
            settings,
            precision=self.precision,
            device=self.device,
            world=self.world,
            initially_frozen=initially_frozen,
            half_under="backbone.",
        )
        self.progress.say(self.trained.summary())
        return self.model

    def build_fit(self, world: World) -> Fit[Batch]:
        """Optimizer, update, batches and loop."""
        settings = self.config.training
        update = build_update(
            self.model, self.trained.master_weights, settings, self.precision, world, head={"head.weight"}
        )
        batches = StepBatches.of(
            settings,
            PackedRows(self.train_rows, self.targets.train, self.device),
            rank=world.data_parallel[0],
            world=world.data_parallel[1],
        )
        return Fit(
            run_dir=self.run_dir,
            config=self.config,
            settings=settings,
            update=update,
            batches=batches,
            objective=with_router_loss(self.objective(), self.backbone, settings.router_aux_loss),
            validation=self._validation(world) if self.config.validates and self.validation_rows else None,
            progress=self.progress,
            callbacks=self.callbacks,
            world=world,
            identity=of_task(
                self.config,
                self.data.space,
                self.train_rows,
                self.targets.train,
                self.pretrained.tokenizer,
                max_length=self.max_length,
                base=self.pretrained.fingerprint,
            ),
            facts=self._facts(),
            unfreeze=self.trained.unfreeze if self.trained.later else None,
        )

    def objective(self) -> TaskObjective:
        """The loss of this config's head."""
        space = self.data.space
        return task_objective(self.model, self.config.model, space.task, self.targets, space.num_outputs)

    def _facts(self) -> dict[str, Any]:
        """The account of rows and tokens, for the log: what was read is used, or dropped for a counted reason."""
        counted = ("examples", "tokens", "truncated", "tokens_cut", "max_length")
        reports = {"training": self.train_tokens, "validation": self.validation_tokens}
        return {
            "rows": [account(report) for report in self.data.reports],
            "tokens": {name: {key: getattr(report, key) for key in counted} for name, report in reports.items()},
            "precision": self.precision,
            "environment": self.environment,
        }

    def _validation(self, world: World) -> Validation:
        settings = self.config.training
        metric = settings.metric or _MAIN_METRIC[self.data.space.task]
        early = settings.early_stopping
        watched = (early.metric if early is not None else None) or metric
        directions = [self.metrics.direction(name, METRIC_DIRECTION) for name in (metric, watched)]
        return Validation(
            lambda: self.validate(world),
            metric,
            directions[0],
            watched,
            directions[1],
            len(self.validation_rows),
            rows_digest(self.validation_rows, self.targets.validation),
            self.metrics.directions,
        )

    def validate(self, world: World = World()) -> dict[str, float]:
        """Loss and metrics on the validation rows. Raises `NonFiniteOutputs`."""
        outputs = self._validation_outputs(world)
        threshold, told = self.config.model.multi_label_threshold, self.data.validation_targets
        meaning = self._meaning(outputs)
        metrics = measure(self.data.space.task, meaning, told, threshold=threshold)
        metrics = {"loss": self.objective().mean_of(outputs, self.targets.validation), **metrics}
        with preserve_random_states():
            return self.metrics.added(metrics, meaning, np.array(told), is_first=world.is_first, gather=world.gather)

    def _validation_outputs(self, world: World) -> Tensor:
        outputs = outputs_of(
            self.model, self.validation_rows, self.device, rank=world.data_parallel[0], world=world.data_parallel[1]
        )
        world.sum_tensors([outputs])
        return outputs

    def _meaning(self, outputs: Tensor) -> Meaning:
        return interpret(self.data.space.task, outputs, target_mean=self.targets.mean, target_std=self.targets.std)

    def export(self) -> None:
        """Takes the best weights, or the last where none are known as best, and writes the model folder and the report;
        every process takes part, and the first one writes.

        Raises `DiskFull`; the run's checkpoints are whole then.
        """
        take_chosen(
            self.trained,
            self.run_dir,
            self.config.training,
            self.result,
            self.world,
            self.progress,
            callbacks=self.callbacks,
        )
        outputs = None
        if self.data.space.task in ("classification", "regression") and self.validation_rows:
            outputs = self._validation_outputs(self.world)
        if not self.trained.gather():
            return
        needed_bytes = 4 * sum(parameter.numel() for parameter in self.model.parameters())
        with explain_disk_full(self.run_dir, needed_bytes, "the trained model"):
            if outputs is not None:
                self._log_predictions(outputs)
            if self.config.training.trainable == "lora":
                backbone, base = self.model.backbone.model, self.config.data.pretrained_weights
                save_lora(backbone, self.run_dir / "adapter", base=base)
                merge_lora(backbone)
            save_task_model(self.run_dir / "model", self.model, self.pretrained.tokenizer, self.description())
            write_report(self.run_dir)
        self.progress.say(f"model: {self.run_dir / 'model'} · report: {self.run_dir / 'report.md'}")
        self.progress.say(f"model: {how_it_opens(self.run_dir / 'model')}")

    def _log_predictions(self, outputs: Tensor) -> None:
        """What the exported weights predict for the validation rows, for the report."""
        meaning = self._meaning(outputs)
        with EventLog(self.run_dir / "events.jsonl", self.callbacks or None) as log:
            if self.data.space.task == "classification":
                matrix = confusion(meaning, self.targets.validation.tolist())
                names = list(self.data.space.class_names)
                log.write("confusion", step=None, metrics={"class_names": names, "matrix": matrix}, timing={})
            else:
                pairs = residual_points(meaning, self.data.validation_targets)
                log.write("residuals", step=None, metrics=pairs, timing={})

    def description(self) -> dict[str, Any]:
        """What the model folder says of its task."""
        space = self.data.space
        return {
            "method": "fine_tuning",
            "task": space.task,
            "pooling": self.pooling,
            "class_names": list(space.class_names),
            "label_space": dataclasses.asdict(space),
            "target_mean": self.targets.mean,
            "target_std": self.targets.std,
            "threshold": self.config.model.multi_label_threshold,
            "max_length": self.max_length,
            "columns": {role: name for role, name in self.data.reports[0].columns.items() if role in ROLES},
            "precision": "bf16" if self.precision == "bf16" else "fp32",
            "pretrained_weights": os.path.basename(self.config.data.pretrained_weights.rstrip("/")),
        }
