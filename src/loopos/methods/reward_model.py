"""Reward modeling: learns from comparisons a score that a policy can be trained on.

    comparisons → chat template → tokens → transformer → score at the last token → −log σ(r_chosen − r_rejected)

Scores of the exported model are normalized over the training responses. After Christiano et al. 2017, Stiennon et al.
2020 and Ouyang et al. 2022.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loopos.config.reward_model import RewardModelConfig
from loopos.data.batches import ComparisonBatch, ComparisonRows, StepBatches
from loopos.data.digest import comparisons_digest
from loopos.data.preference_data import load_comparisons
from loopos.data.preference_tokens import EncodedComparison, PreferenceEncoder
from loopos.evaluation.preference_metrics import PREFERENCE_METRIC_DIRECTION
from loopos.evaluation.preference_report import bucket_tables, measured, preferred_scores
from loopos.evaluation.reward_predictor import Normalization, comparison_scores
from loopos.methods.base import Trainer
from loopos.models.adapters import set_trained
from loopos.models.attention import prompt_runs_once
from loopos.models.backbone import Backbone
from loopos.models.folders import save_task_model
from loopos.models.heads import PooledModel, scalar_head_std
from loopos.models.load import Pretrained
from loopos.models.saved_adapters import merge_lora, save_lora
from loopos.models.task_layout import how_it_opens
from loopos.storage.events import EventLog
from loopos.training.fit import Fit
from loopos.training.identity import of_preferences
from loopos.training.objectives import PairObjective, with_router_loss
from loopos.training.validation import Validation


class RewardModelTrainer(Trainer[RewardModelConfig]):
    """Learns what people prefer: `RewardModelTrainer(config).train()`."""

    def load_data(self) -> Pretrained:
        """Reads the comparisons, loads the model, and tokenizes by its template; says what was decided."""
        config, data = self.config, self.config.data
        self.data = load_comparisons(data, data.source, seed=config.training.seed)
        self.pretrained = self.load_pretrained()
        self.max_length = self.longest_of(self.pretrained)
        self.encoder = PreferenceEncoder(data, self.pretrained.tokenizer, max_length=self.max_length)
        self.train_rows, self.train_tokens = self.encoder.comparisons(self.data.train)
        self.validation_rows: list[EncodedComparison] = []
        lines = [
            self.pretrained.summary,
            *self.data.summary,
            self.encoder.template.summary,
            f"tokens: {self.train_tokens.summary()}",
        ]
        if config.validates and self.data.validation:
            self.validation_rows, self.validation_tokens = self.encoder.comparisons(self.data.validation)
            lines.append(f"validation tokens: {self.validation_tokens.summary()}")
        for sentence in lines:
            self.progress.say(sentence)
        return self.pretrained

    def build_model(self) -> PooledModel:
        """Backbone and scalar heads, what trains, the number format."""
        settings = self.config.training
        self.choose_precision()
        self.backbone = backbone = Backbone(self.pretrained.model, attention=self.config.model.attention)
        self.shares_prompts = self.device.type == "cpu" and backbone.supports_shared_prefixes
        self.print_attention(backbone)
        if not self.shares_prompts:
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

    def rows(self, examples: list[EncodedComparison]) -> ComparisonRows:
        """Comparisons as batches take them; a prompt is computed once where the attention serves it."""
        reward = self.config.reward
        runs_once = prompt_runs_once((each.num_tokens for each in examples), on_cpu=self.device.type == "cpu")
        return ComparisonRows(
            examples,
            self.device,
            share_prompts=self.shares_prompts and runs_once,
            margins=reward.margins,
            soft_labels=reward.soft_labels,
        )

    def build_fit(self) -> Fit[ComparisonBatch]:
        """Optimizer, update, batches and loop."""
        settings, (rank, size) = self.config.training, self.world.data_parallel
        pairs = PairObjective(self.model, self.config.reward.center_rewards, self.config.reward.loss)
        return self.fit_of(
            update=self.update_of(self.model, head={"head.weight"}),
            batches=StepBatches.of(settings, self.rows(self.train_rows), rank=rank, world=size),
            objective=with_router_loss(pairs, self.backbone, settings.router_aux_loss),
            validation=self._validation() if self.validation_rows else None,
            identity=of_preferences(self.config, self.train_rows, self.encoder, base=self.pretrained.fingerprint),
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
            self.watched("pair_accuracy"),
            PREFERENCE_METRIC_DIRECTION,
            num_rows=len(self.validation_rows),
            digest=comparisons_digest(self.validation_rows),
        )

    def scores(self, examples: list[EncodedComparison]) -> list[list[list[float]]]:
        """Raw scores of every comparison's responses, of all shares together."""
        was_training = self.model.training
        self.model.eval()
        own = comparison_scores(
            self.model, self.rows(examples), rank=self.world.data_parallel[0], world=self.world.data_parallel[1]
        )
        self.model.train(was_training)
        found: dict[int, list[list[float]]] = {}
        for part in self.world.gather_data_parallel(own):
            assert isinstance(part, dict)
            found.update(part)
        return [found[index] for index in range(len(examples))]

    def validate(self) -> dict[str, float]:
        """The metrics of the validation comparisons."""
        rows, scores = self.validation_rows, self.scores(self.validation_rows)
        metrics, (preferred, other) = measured(rows, scores), preferred_scores(rows, scores)
        return self.with_own_metrics(metrics, preferred, other)

    def before_writing(self) -> None:
        """Normalizes the scores over training responses, and scores the validation comparisons for the report."""
        self.normalization = Normalization.none(self.config.reward.heads)
        if self.config.reward.normalize:
            every = [score for scores in self.scores(self._normalizing_rows()) for score in scores]
            self.normalization = found = Normalization.of(torch.tensor(every))
            spread = ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(found.mean, found.std, strict=True))
            self.progress.say(f"scores of {len(every)} training responses before normalizing: {spread}")
        self.validation_scores = self.scores(self.validation_rows) if self.validation_rows else []

    def exported(self) -> PooledModel:
        return self.model

    def write_model(self) -> None:
        if self.validation_scores:
            with EventLog(self.run_dir / "events.jsonl", self.callbacks or None) as log:
                tables = bucket_tables(self.validation_rows, self.validation_scores)
                log.write("preferences", step=None, metrics=tables, timing={})
        if self.lora is not None:
            backbone = self.model.backbone.model
            save_lora(backbone, self.run_dir / "adapter", base=self.config.data.pretrained_weights)
            merge_lora(backbone)
        self.pretrained.tokenizer.chat_template = self.encoder.template.source
        save_task_model(self.run_dir / "model", self.model, self.pretrained.tokenizer, self.description())

    def export_summary(self) -> list[str]:
        return [*super().export_summary(), f"model: {how_it_opens(self.run_dir / 'model')}"]

    def _normalizing_rows(self) -> list[EncodedComparison]:
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
            **super().description(),
        }
