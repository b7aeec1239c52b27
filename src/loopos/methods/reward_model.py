"""Reward modeling: learns from comparisons, or from step labels, a score that a policy can be trained on.

    comparisons → chat template → tokens → transformer → score at the last token → −log σ(r_chosen − r_rejected)
    step labels → chat template → tokens → transformer → score at each step's end → −y log σ(s) − (1 − y) log σ(−s)

Scores of whole responses are normalized over the training responses. After Christiano et al. 2017, Stiennon et al. 2020
and Ouyang et al. 2022; step labels (a process reward model) after Uesato et al. 2022 and Lightman et al. 2023. Which of
the two it is depends on the columns; `reward_rows` has what differs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loopos.config.reward_model import RewardModelConfig
from loopos.data.batches import Rows, StepBatches
from loopos.data.preference_data import has_step_labels, load_judgments
from loopos.data.preference_tokens import PreferenceEncoder
from loopos.evaluation.reward_predictor import Normalization
from loopos.methods.base import Trainer
from loopos.methods.reward_rows import Comparisons, RewardRows, StepLabels
from loopos.models.adapters import set_trained
from loopos.models.backbone import Backbone
from loopos.models.folders import save_task_model
from loopos.models.heads import PooledModel, scalar_head_std
from loopos.models.load import Pretrained
from loopos.models.saved_adapters import merge_lora, save_lora
from loopos.models.task_layout import how_it_opens
from loopos.storage.events import EventLog
from loopos.training.fit import Fit
from loopos.training.objectives import with_router_loss
from loopos.training.validation import Validation


class RewardModelTrainer(Trainer[RewardModelConfig]):
    """Learns what people prefer: `RewardModelTrainer(config).train()`."""

    def load_data(self) -> Pretrained:
        """Reads the rows, loads the model, and tokenizes by its template; says what was decided."""
        config, data = self.config, self.config.data
        self.data = load_judgments(data, data.source, seed=config.training.seed)
        self.pretrained = self.load_pretrained()
        self.max_length = self.longest_of(self.pretrained)
        self.encoder = PreferenceEncoder(data, self.pretrained.tokenizer, max_length=self.max_length)
        kind = StepLabels if has_step_labels(self.data) else Comparisons
        self.learned: RewardRows = kind(config, self.encoder, self.device)
        self.train_rows, self.train_tokens = self.learned.encode(self.data.train)
        self.validation_rows: list[Any] = []
        lines = [
            self.pretrained.summary,
            *self.data.summary,
            self.encoder.template.summary,
            f"tokens: {self.train_tokens.summary()}",
        ]
        if config.validates and self.data.validation:
            self.validation_rows, self.validation_tokens = self.learned.encode(self.data.validation)
            lines.append(f"validation tokens: {self.validation_tokens.summary()}")
        self.progress.say(*lines)
        self.progress.say(*(f"note: {each}" for each in self.learned.without_effect()))
        return self.pretrained

    def build_model(self) -> PooledModel:
        """Backbone and scalar heads, what trains, the number format."""
        settings = self.config.training
        self.choose_precision()
        self.backbone = backbone = Backbone(self.pretrained.model, attention=self.config.model.attention)
        self.shares_prompts = self.device.type == "cpu" and backbone.supports_shared_prefixes
        self.learned.shares_prompts = self.shares_prompts
        self.print_attention(backbone)
        if not self.shares_prompts and isinstance(self.learned, Comparisons):
            self.progress.say("prompts are computed once per response: shared prefixes are not exact for this model")
        initially_frozen = set_trained(backbone.model, settings, self.config.data.adapter)
        if settings.gradient_checkpointing:
            backbone.model.activation_checkpointing_enable()
        self.model = PooledModel(
            backbone,
            num_outputs=self.config.reward.heads,
            pooling="last",
            seed=settings.seed,
            head_std=scalar_head_std(backbone.hidden_size),
        )
        self.train_weights(self.model, initially_frozen=initially_frozen, half_under="backbone.")
        self.progress.say(self.trained.summary())
        return self.model

    def rows(self, examples: list[Any]) -> Rows[Any]:
        """Encoded rows as batches take them."""
        return self.learned.batches(examples)

    def build_fit(self) -> Fit[Any]:
        """Optimizer, update, batches and loop."""
        settings, (rank, size) = self.config.training, self.world.data_parallel
        objective = self.learned.objective(self.model)
        return self.fit_of(
            update=self.update_of(self.model, head={"head.weight"}),
            batches=StepBatches.of(settings, self.rows(self.train_rows), rank=rank, world=size),
            objective=with_router_loss(objective, self.backbone, settings.router_aux_loss),
            validation=self._validation() if self.validation_rows else None,
            identity=self.learned.identity(self.train_rows, base=self.pretrained.fingerprint),
            facts=self._facts(),
        )

    def _facts(self) -> dict[str, Any]:
        """The account of rows and tokens, for the log."""
        return {
            "rows": [report.summary() for report in self.data.reports],
            "tokens": {"training": self.train_tokens.counts()},
            "shared prompts": self.shares_prompts,
        }

    def _validation(self) -> Validation:
        return self.validation_of(
            self.watched(self.learned.metric),
            self.learned.directions,
            num_rows=len(self.validation_rows),
            digest=self.learned.digest(self.validation_rows),
        )

    def scores(self, examples: list[Any]) -> list[list[list[float]]]:
        """Raw scores of the responses or steps of every row, of all ranks together."""
        (rank, size), was_training = self.world.data_parallel, self.model.training
        self.model.eval()
        own = self.learned.scores(self.model, examples, rank=rank, world=size)
        self.model.train(was_training)
        found: dict[int, list[list[float]]] = {}
        for part in self.world.gather_data_parallel(own):
            assert isinstance(part, dict)
            found.update(part)
        return [found[index] for index in range(len(examples))]

    def validate(self) -> dict[str, float]:
        """The metrics of the validation rows."""
        rows = self.validation_rows
        return self.with_own_metrics(*self.learned.measured(rows, self.scores(rows)))

    def before_writing(self) -> None:
        """Normalizes the scores of whole responses, and scores the validation rows for the report."""
        self.normalization = Normalization.none(self.config.reward.heads)
        if self.config.reward.normalize and isinstance(self.learned, Comparisons):
            every = [score for scores in self.scores(self._normalizing_rows()) for score in scores]
            self.normalization = found = Normalization.of(torch.tensor(every))
            spread = ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(found.mean, found.std, strict=True))
            self.progress.say(f"scores of {len(every)} training responses before normalizing: {spread}")
        self.validation_scores = self.scores(self.validation_rows) if self.validation_rows else []

    def exported(self) -> PooledModel:
        return self.model

    def write_model(self) -> None:
        tables = self.learned.tables(self.validation_rows, self.validation_scores) if self.validation_scores else None
        if tables is not None:
            with EventLog(self.run_dir / "events.jsonl", self.callbacks or None) as log:
                log.write("preferences", step=None, metrics=tables, timing={})
        if self.lora is not None:
            backbone = self.model.backbone.model
            save_lora(backbone, self.run_dir / "adapter", base=self.config.data.pretrained_weights)
            merge_lora(backbone)
        self.pretrained.tokenizer.chat_template = self.encoder.template.source
        save_task_model(self.run_dir / "model", self.model, self.pretrained.tokenizer, self.description())

    def export_summary(self) -> list[str]:
        return [*super().export_summary(), f"model: {how_it_opens(self.run_dir / 'model')}"]

    def _normalizing_rows(self) -> list[Any]:
        """Training comparisons, at most `reward.normalize_over` of them, the same ones for the same seed."""
        most = self.config.reward.normalize_over
        if len(self.train_rows) <= most:
            return self.train_rows
        draw = np.random.Generator(np.random.PCG64(self.config.training.seed))
        return [self.train_rows[index] for index in sorted(draw.permutation(len(self.train_rows))[:most])]

    def description(self) -> dict[str, Any]:
        """What the model folder records of its scores."""
        heads = self.config.reward.heads
        return {
            "method": "reward_model",
            "task": "reward",
            "pooling": "last",
            "class_names": [] if heads == 1 else [f"reward_{index}" for index in range(heads)],
            "score_mean": list(self.normalization.mean),
            "score_std": list(self.normalization.std),
            "base": self.pretrained.fingerprint,
            "text": self.config.data.chat_template == "none",
            "max_length": self.max_length,
            **self.learned.description(),
            **super().description(),
        }
