"""Fine-tuning: a head over pooled hidden states, trained through the whole transformer.

    tokens → hidden states → pool → head → loss → gradients → update

After Devlin et al. 2019 (section 3.2) and Hu et al. 2021 (LoRA). `evaluation.predictor` uses the trained model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from loopos.config.fine_tuning import FineTuningConfig
from loopos.data.batches import Batch, PackedRows, StepBatches
from loopos.data.digest import rows_digest
from loopos.data.formats import ROLES
from loopos.data.labeled import LabeledData, check_for_task, load_labeled
from loopos.data.reading import DataReport
from loopos.data.targets import targets_of
from loopos.data.tokens import Encoded, encode_labeled
from loopos.evaluation.metrics import METRIC_DIRECTION
from loopos.evaluation.outputs import Meaning, confusion, interpret, measure, outputs_of, residual_points
from loopos.methods.base import Trainer
from loopos.models.adapters import set_trained
from loopos.models.backbone import Backbone
from loopos.models.folders import save_task_model
from loopos.models.heads import PooledModel
from loopos.models.load import Pretrained
from loopos.models.saved_adapters import merge_lora, save_lora
from loopos.models.task_layout import default_pooling, how_it_opens
from loopos.storage.events import EventLog
from loopos.training.fit import Fit
from loopos.training.identity import of_task
from loopos.training.objectives import TaskObjective, task_objective, with_router_loss
from loopos.training.validation import Validation

_MAIN_METRIC = {"classification": "accuracy", "multi_label": "micro_f1", "regression": "mae"}


class FineTuner(Trainer[FineTuningConfig]):
    """Adapts a pretrained language model to a task: `FineTuner(config).train()`."""

    def load_data(self) -> tuple[Pretrained, LabeledData]:
        """Reads, splits and tokenizes the rows; says what was decided."""
        config, section = self.config, self.config.model
        self.data = load_labeled(config.data, section, seed=config.training.seed)
        check_for_task(config, self.data.space)
        self.pretrained = self.load_pretrained()
        self.max_length = self.longest_of(self.pretrained)
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

    def _encode(self, examples: Sequence[Any]) -> tuple[list[Encoded], DataReport]:
        return encode_labeled(
            self.pretrained.tokenizer,
            examples,
            max_length=self.max_length,
            on_truncation=self.config.data.on_truncation,
        )

    def build_model(self) -> PooledModel:
        """Backbone and head, what trains, and the number format."""
        settings, section = self.config.training, self.config.model
        self.choose_precision()
        self.backbone = backbone = Backbone(self.pretrained.model, attention=section.attention)
        self.print_attention(backbone)
        initially_frozen = set_trained(backbone.model, settings, self.config.data.adapter)
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
        self.train_weights(self.model, initially_frozen=initially_frozen, half_under="backbone.")
        self.progress.say(self.trained.summary())
        return self.model

    def build_fit(self) -> Fit[Batch]:
        """Optimizer, update, batches and loop."""
        settings, (rank, size) = self.config.training, self.world.data_parallel
        rows = PackedRows(self.train_rows, self.targets.train, self.device)
        return self.fit_of(
            update=self.update_of(self.model, head={"head.weight"}),
            batches=StepBatches.of(settings, rows, rank=rank, world=size),
            objective=with_router_loss(self.objective(), self.backbone, settings.router_aux_loss),
            validation=self._validation() if self.config.validates and self.validation_rows else None,
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
        )

    def objective(self) -> TaskObjective:
        """The loss of this config's head."""
        space = self.data.space
        return task_objective(self.model, self.config.model, space.task, self.targets, space.num_outputs)

    def _facts(self) -> dict[str, Any]:
        """The account of rows and tokens, for the log: what was read is used, or dropped for a counted reason."""
        # Keys of the log → fields of a report.
        counted = {"examples": "used", "tokens": "tokens", "truncated": "cut"}
        counted |= {"tokens_cut": "tokens_cut", "max_length": "max_length"}
        reports = {"training": self.train_tokens, "validation": self.validation_tokens}
        return {
            "rows": [report.summary() for report in self.data.reports],
            "tokens": {
                name: {key: getattr(report, own) for key, own in counted.items()} for name, report in reports.items()
            },
        }

    def _validation(self) -> Validation:
        return self.validation_of(
            self.watched(_MAIN_METRIC[self.data.space.task]),
            METRIC_DIRECTION,
            num_rows=len(self.validation_rows),
            digest=rows_digest(self.validation_rows, self.targets.validation),
        )

    def validate(self) -> dict[str, float]:
        """Loss and metrics on the validation rows. Raises `NonFiniteOutputs`."""
        outputs = self._validation_outputs()
        threshold, labels = self.config.model.multi_label_threshold, self.data.validation_targets
        meaning = self._meaning(outputs)
        metrics = measure(self.data.space.task, meaning, labels, threshold=threshold)
        metrics = {"loss": self.objective().mean_of(outputs, self.targets.validation), **metrics}
        return self.with_own_metrics(metrics, meaning, np.array(labels))

    def _validation_outputs(self) -> Tensor:
        rank, size = self.world.data_parallel
        outputs = outputs_of(self.model, self.validation_rows, self.device, rank=rank, world=size)
        self.world.sum_tensors([outputs])
        return outputs

    def _meaning(self, outputs: Tensor) -> Meaning:
        return interpret(self.data.space.task, outputs, target_mean=self.targets.mean, target_std=self.targets.std)

    def before_writing(self) -> None:
        self.outputs: Tensor | None = None
        if self.data.space.task in ("classification", "regression") and self.validation_rows:
            self.outputs = self._validation_outputs()

    def exported(self) -> PooledModel:
        return self.model

    def write_model(self) -> None:
        if self.outputs is not None:
            self._log_predictions(self.outputs)
        if self.lora is not None:
            backbone = self.model.backbone.model
            save_lora(backbone, self.run_dir / "adapter", base=self.config.data.pretrained_weights)
            merge_lora(backbone)
        save_task_model(self.run_dir / "model", self.model, self.pretrained.tokenizer, self.description())

    def export_summary(self) -> list[str]:
        return [*super().export_summary(), f"model: {how_it_opens(self.run_dir / 'model')}"]

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
            **super().description(),
        }
