"""Reward modelling: from preferences between responses to a score that a policy can be trained on.

    comparisons → chat template → tokens → transformer → score at the last token → −log σ(r_chosen − r_rejected)

Enters: a `RewardModelConfig`. Leaves: a run folder with checkpoints, events, a report and the trained reward model,
whose scores are normalised over the training responses. After Christiano et al. 2017, Stiennon et al. 2020 and Ouyang
et al. 2022. Left out: the loop (`training.fit`), the reading of data (`data.preference_data`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopos.config.differences import as_begun
from loopos.config.reward_model import RewardModelConfig
from loopos.data.batches import ComparisonBatch, ComparisonRows, StepBatches
from loopos.data.digest import comparisons_digest
from loopos.data.preference_data import load_comparisons
from loopos.data.preference_tokens import EncodedComparison, PreferenceEncoder
from loopos.data.reading import account
from loopos.data.tokens import longest
from loopos.evaluation.own_metrics import OwnMetrics
from loopos.evaluation.preference_metrics import PREFERENCE_METRIC_DIRECTION
from loopos.evaluation.preference_report import bucket_tables, measured, preferred_scores
from loopos.evaluation.report import write_report
from loopos.evaluation.reward_predictor import Normalization, comparison_scores
from loopos.evaluation.run_claim import claim
from loopos.models.adapters import merge_lora, save_lora, set_trained
from loopos.models.attention import FUSED_FROM
from loopos.models.backbone import Backbone
from loopos.models.folders import save_task_model
from loopos.models.heads import PooledModel, scalar_head_std
from loopos.models.load import Pretrained, Sizes, load_pretrained
from loopos.models.task_layout import how_it_opens
from loopos.storage.durable import explain_disk_full
from loopos.storage.events import EventLog
from loopos.training.callbacks import Callbacks, kept_random_states
from loopos.training.distributed import World
from loopos.training.fit import Fit
from loopos.training.identity import of_preferences
from loopos.training.objectives import PairObjective, with_router_loss
from loopos.training.precision import resolve
from loopos.training.progress import RunProgress
from loopos.training.run_state import FitResult
from loopos.training.session import session
from loopos.training.trained_weights import TrainedWeights, take_chosen
from loopos.training.update import build_update
from loopos.training.validation import Validation


@dataclass(eq=False)
class RewardModelTrainer:
    """Learns what people prefer: `RewardModelTrainer(config).train()`.

    `environment`: settings of the process, by name, for the log. `callbacks`, `metrics`: the user's own functions.
    """

    config: RewardModelConfig
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
        """Data, model, fit, normalisation, export, report. Raises `UserError` for a mistake of the user's; nothing of
        an earlier run is overwritten without `resume`.
        """
        with (
            session(self.config.training, self.config.distributed) as (self.device, self.world),
            claim(self.run_dir, self.world, resume=resume, note=self.progress.warn),
        ):
            self.config = as_begun(self.config, self.run_dir)
            self.load_data()
            self.build_model()
            fit = self.build_fit()
            fit.open(resume=resume)
            self.result = fit.run()
            if not self.result.interrupted:
                self.export()
            self.world.wait()
        return self.result

    def load_data(self) -> Pretrained:
        """Reads the comparisons, loads the model, and tokenises by its template; says what was decided."""
        config, data = self.config, self.config.data
        self.data = load_comparisons(data, data.source, seed=config.training.seed)
        self.pretrained = load_pretrained(
            data.pretrained_weights,
            sizes=Sizes.of(config.model, max_length=config.training.max_length),
            tokenizer=data.tokenizer,
            trust_remote_code=self.trust_remote_code,
        )
        positions = getattr(self.pretrained.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = longest(self.pretrained.tokenizer, positions, config.training.max_length)
        self.encoder = PreferenceEncoder(data, self.pretrained.tokenizer, max_length=self.max_length)
        self.train_rows, self.train_tokens = self.encoder.comparisons(self.data.train)
        self.validation_rows: list[EncodedComparison] = []
        told = [
            self.pretrained.summary,
            *self.data.summary,
            self.encoder.template.summary,
            f"tokens: {self.train_tokens.summary()}",
        ]
        if config.validates and self.data.validation:
            self.validation_rows, self.validation_tokens = self.encoder.comparisons(self.data.validation)
            told.append(f"validation tokens: {self.validation_tokens.summary()}")
        for sentence in told:
            self.progress.say(sentence)
        return self.pretrained

    def build_model(self) -> PooledModel:
        """Backbone and scalar heads, what trains, the number format."""
        settings = self.config.training
        self.precision = resolve(settings.precision, self.device)
        self.backbone = backbone = Backbone(self.pretrained.model, attention=self.config.model.attention)
        self.shares_prompts = self.device.type == "cpu" and backbone.shares_trunks
        self.progress.say(f"attention: {backbone.path}" + (f" ({backbone.reason})" if backbone.reason else ""))
        if not self.shares_prompts:
            self.progress.say("prompts: computed once for each response, not once for all of a row")
        held_back = set_trained(backbone.model, settings)
        if settings.gradient_checkpointing:
            backbone.model.activation_checkpointing_enable()
        self.model = PooledModel(
            backbone,
            num_outputs=self.config.reward.heads,
            pooling="last",
            seed=settings.seed,
            head_std=scalar_head_std(backbone.hidden_size),
        )
        self.trained = TrainedWeights(
            self.model,
            settings,
            precision=self.precision,
            device=self.device,
            world=self.world,
            held_back=held_back,
            half_under="backbone.",
        )
        self.progress.say(self.trained.summary())
        return self.model

    def rows(self, examples: list[EncodedComparison]) -> ComparisonRows:
        """Comparisons as batches take them; a prompt is computed once where the attention serves it."""
        reward = self.config.reward
        short = max(example.num_tokens for example in examples) < FUSED_FROM
        return ComparisonRows(
            examples,
            self.device,
            share_prompts=self.shares_prompts and short,
            margins=reward.margins,
            soft_labels=reward.soft_labels,
        )

    def build_fit(self) -> Fit[ComparisonBatch]:
        """Optimizer, update, batches and loop."""
        settings, world = self.config.training, self.world
        return Fit(
            run_dir=self.run_dir,
            config=self.config,
            settings=settings,
            update=build_update(
                self.model, self.trained.master_weights, settings, self.precision, world, head={"head.weight"}
            ),
            batches=StepBatches.of(settings, self.rows(self.train_rows), rank=world.share[0], world=world.share[1]),
            objective=with_router_loss(
                PairObjective(self.model, self.config.reward.centring), self.backbone, settings.router_aux_loss
            ),
            validation=self._validation() if self.validation_rows else None,
            progress=self.progress,
            callbacks=self.callbacks,
            world=world,
            identity=of_preferences(self.config, self.train_rows, self.encoder, base=self.pretrained.fingerprint),
            facts=self._facts(),
            unfreeze=self.trained.unfreeze if self.trained.later else None,
        )

    def _facts(self) -> dict[str, Any]:
        """The account of rows and tokens, for the log."""
        return {
            "rows": [account(report) for report in self.data.reports],
            "tokens": {"training": self.train_tokens.counts()},
            "precision": self.precision,
            "shared prompts": self.shares_prompts,
            "environment": self.environment,
        }

    def _validation(self) -> Validation:
        settings = self.config.training
        metric = settings.metric or "pair_accuracy"
        early = settings.early_stopping
        watched = (early.metric if early is not None else None) or metric
        directions = [self.metrics.direction(name, PREFERENCE_METRIC_DIRECTION) for name in (metric, watched)]
        rows, digest, own = len(self.validation_rows), comparisons_digest(self.validation_rows), self.metrics.directions
        return Validation(self.validate, metric, directions[0], watched, directions[1], rows, digest, own)

    def scores(self, examples: list[EncodedComparison]) -> list[list[list[float]]]:
        """Raw scores of every comparison's responses, of all shares together."""
        was_training = self.model.training
        self.model.eval()
        own = comparison_scores(self.model, self.rows(examples), rank=self.world.share[0], world=self.world.share[1])
        self.model.train(was_training)
        found: dict[int, list[list[float]]] = {}
        for part in self.world.gather_shares(own):
            assert isinstance(part, dict)
            found.update(part)
        return [found[index] for index in range(len(examples))]

    def validate(self) -> dict[str, float]:
        """The metrics of the validation comparisons."""
        rows, scores = self.validation_rows, self.scores(self.validation_rows)
        metrics, (preferred, other) = measured(rows, scores), preferred_scores(rows, scores)
        with kept_random_states():
            return self.metrics.added(metrics, preferred, other, is_first=self.world.is_first, gather=self.world.gather)

    def export(self) -> None:
        """Takes the best weights, normalises the scores, and writes the model folder and the report. Raises `DiskFull`;
        the run's checkpoints are whole then.
        """
        settings, heads = self.config.training, self.config.reward.heads
        take_chosen(
            self.trained, self.run_dir, settings, self.result, self.world, self.progress, callbacks=self.callbacks
        )
        normalisation = Normalization.none(heads)
        if self.config.reward.normalise:
            every = [score for scores in self.scores(self._normalising_rows()) for score in scores]
            normalisation = Normalization.of(torch.tensor(every))
            told = ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(normalisation.mean, normalisation.std, strict=True))
            self.progress.say(f"scores of {len(every)} training responses before normalising: {told}")
        validation = self.scores(self.validation_rows) if self.validation_rows else []
        if not self.trained.gather():
            return
        needed_bytes = 4 * sum(parameter.numel() for parameter in self.model.parameters())
        with explain_disk_full(self.run_dir, needed_bytes, "the trained model"):
            if validation:
                with EventLog(self.run_dir / "events.jsonl", self.callbacks or None) as log:
                    tables = bucket_tables(self.validation_rows, validation)
                    log.write("preferences", step=None, metrics=tables, timing={})
            backbone = self.model.backbone.model
            if settings.trainable == "lora":
                base = self.config.data.pretrained_weights
                save_lora(backbone, self.run_dir / "adapter", base=base)
                merge_lora(backbone)
            self.pretrained.tokenizer.chat_template = self.encoder.template.source
            description = self.description(normalisation)
            save_task_model(self.run_dir / "model", self.model, self.pretrained.tokenizer, description)
            write_report(self.run_dir)
        self.progress.say(f"model: {self.run_dir / 'model'} · report: {self.run_dir / 'report.md'}")
        self.progress.say(f"model: {how_it_opens(self.run_dir / 'model')}")

    def _normalising_rows(self) -> list[EncodedComparison]:
        """Training comparisons, at most `reward.normalise_over` of them, the same ones for the same seed."""
        most = self.config.reward.normalise_over
        if len(self.train_rows) <= most:
            return self.train_rows
        draw = np.random.Generator(np.random.PCG64(self.config.training.seed))
        return [self.train_rows[place] for place in sorted(draw.permutation(len(self.train_rows))[:most])]

    def description(self, normalisation: Normalization) -> dict[str, Any]:
        """What the model folder says of its scores."""
        heads = self.config.reward.heads
        weights = self.config.data.pretrained_weights
        return {
            "method": "reward_model",
            "task": "reward",
            "pooling": "last",
            "class_names": [] if heads == 1 else [f"reward_{index}" for index in range(heads)],
            "score_mean": list(normalisation.mean),
            "score_std": list(normalisation.std),
            "base": self.pretrained.fingerprint,
            "text": self.config.data.chat_template == "none",
            "max_length": self.max_length,
            "precision": "bf16" if self.precision == "bf16" else "fp32",
            "pretrained_weights": os.path.basename(weights.rstrip("/")),
        }
