"""Preference optimization: a policy learns from comparisons directly, without a reward model or sampling.

    comparisons → chat template → tokens → log π and log ρ of both responses → a loss of `functional.preference_losses`

DPO (Rafailov et al. 2023) and its relatives; the method's name is a preset of `preference.loss` and `preference.beta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopos.config.diagnostics import UserError
from loopos.config.preference import PreferenceConfig
from loopos.data.batches import ComparisonRows, StepBatches, in_step
from loopos.data.digest import comparisons_digest
from loopos.data.preference_data import PreferenceData, load_comparisons
from loopos.data.preference_tokens import EncodedComparison, PreferenceEncoder
from loopos.data.preferences import Comparison
from loopos.data.response_batches import PreferenceBatch, PreferenceRows
from loopos.functional.packing import PackedLayout
from loopos.functional.preference_losses import LossSettings
from loopos.methods.base import Direction, Trainer
from loopos.models.adapters import AdapterView, set_trained_language_model
from loopos.models.attention import prompt_runs_once
from loopos.models.folders import export_language_model
from loopos.models.language_model import LanguageModel
from loopos.rl.preference_check import (
    GeneratedAnswers,
    GeneratingPolicy,
    PreferenceState,
    ValidationPrompts,
    start_copy,
)
from loopos.rl.preference_monitor import PreferenceMonitor
from loopos.rl.roles import Reference, without_dropout
from loopos.training.fit import Fit
from loopos.training.identity import of_comparisons
from loopos.training.objectives import with_router_loss
from loopos.training.preference_objective import PreferenceBatches, PreferenceObjective, ranked
from loopos.training.progress import write_samples
from loopos.training.reference import ReferenceCache, cached_logprobs
from loopos.training.validation import Validation

DIRECTIONS: dict[str, Direction] = {
    "loss": "min",
    "accuracy": "max",
    "reward_margin": "max",
    "win_rate": "max",
    "judge": "max",
}
# Tokens of one forward pass of validation.
VALIDATION_TOKENS = 2048


class Policy(nn.Module):
    """A language model as log-probabilities of chosen tokens."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, layout: PackedLayout, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of `targets` `[M]` after `positions` `[M]`, and entropies, nats. ids `[T]` → two `[M]`."""
        return self.model.logprobs(self.model.backbone(ids, layout)[positions], targets)


class PreferenceTrainer(Trainer[PreferenceConfig]):
    """Trains a policy on comparisons: `PreferenceTrainer(config).train()`."""

    data: PreferenceData[Any]

    def load_data(self) -> None:
        """Reads the comparisons, loads the model, and tokenizes by its template."""
        self.refuse_own_metrics()
        config, data = self.config, self.config.data
        self.data = load_comparisons(data, data.source, seed=config.training.seed)
        self.pretrained = self.load_pretrained(causal=True)
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
        self.progress.say(*lines)

    def refuse_own_metrics(self) -> None:
        """Raises `UserError` for metrics of the user: there are no predictions that they could compare with targets."""
        if self.metrics:
            name = self.config.computation.method
            raise UserError(f"metrics: got functions; expected none with {name}, whose validation has no predictions")

    def build_model(self) -> Policy:
        """The policy, what trains, the number format, and where the reference comes from."""
        settings = self.config.training
        self.choose_precision()
        start = start_copy(self.pretrained, self.config, self.precision)
        language_model = LanguageModel(self.pretrained.model, attention=self.config.model.attention)
        self.backbone = backbone = language_model.backbone
        self.shares_prompts = self.device.type == "cpu" and backbone.supports_shared_prefixes
        self.print_attention(backbone)
        initially_frozen = set_trained_language_model(language_model.causal, backbone.model, settings)
        if settings.gradient_checkpointing:
            language_model.causal.activation_checkpointing_enable()
        without_dropout(language_model)
        self.model = Policy(language_model)
        frozen = () if start is None else (start,)
        self.train_weights(self.model, initially_frozen=initially_frozen, frozen=frozen)
        self.progress.say(self.trained.summary())
        self.objective = self.build_objective()
        self.monitor, self.generated = PreferenceMonitor(self.config), self.build_answers(start)
        return self.model

    def build_answers(self, start: LanguageModel | None) -> GeneratedAnswers | None:
        """What validation generates; None where it generates nothing. start: a copy of the starting weights."""
        config, rows = self.config, self.validation_comparisons()
        if config.evaluation is None or not rows:
            return None
        longest = None if self.max_length is None else self.max_length - config.generation.max_new_tokens
        prompts = ValidationPrompts.of(rows, number=config.evaluation.prompts, longest=longest)
        stops = self.encoder.template.stop_tokens
        policy = GeneratingPolicy(self.model.model, self.pretrained.tokenizer, tuple(stops), start)
        with self.trained.whole():
            answers = GeneratedAnswers(config, prompts, policy, device=self.device, world=self.world)
        self.progress.say(answers.summary)
        return answers

    def validation_comparisons(self) -> list[tuple[list[int], Comparison, int | None]]:
        """Of each validation row the prompt's ids, the row, and the index of the preferred response."""
        examples = self.data.validation
        return [(each.prompt, examples[each.index], each.pairs[0].better) for each in self.validation_rows]

    def method_state(self) -> PreferenceState:
        """What a checkpoint holds besides weights and optimizer."""
        return PreferenceState(self.monitor, self.generated, self.progress.warn)

    @property
    def caches_reference(self) -> bool:
        """Whether the reference's log-probabilities are computed once and kept."""
        chosen = self.config.preference.reference
        return self.config.needs_reference and (chosen == "cached" or (chosen == "auto" and self.lora is None))

    def without_adapters(self) -> Callable[[Any], Tensor] | None:
        """Computes the reference's log-probabilities of a batch; None where they are cached or not needed."""
        if self.caches_reference or not self.config.needs_reference:
            return None
        reference = Reference(self.model.model, AdapterView(self.backbone, None), temperature=1.0)
        return lambda batch: reference(batch.ids, batch.layout, batch.positions, batch.targets)

    def build_objective(self) -> Any:
        """The losses and what is reported beside them."""
        section, config = self.config.preference, self.config
        settings = LossSettings(
            beta=config.beta,
            label_smoothing=section.label_smoothing,
            simpo_margin=section.simpo_margin,
            discopop_temperature=section.discopop_temperature,
            divergence=section.divergence,
            divergence_alpha=section.divergence_alpha,
        )
        return PreferenceObjective(
            self.model,
            config.losses,
            settings,
            reference=self.without_adapters(),
            length_alpha=section.length_alpha,
        )

    def rows(self, examples: list[EncodedComparison]) -> PreferenceRows:
        """Comparisons as batches take them, with the reference's log-probabilities if these are cached."""
        section = self.config.preference
        runs_once = prompt_runs_once((each.num_tokens for each in examples), on_cpu=self.device.type == "cpu")
        comparisons = ComparisonRows(
            examples,
            self.device,
            share_prompts=self.shares_prompts and runs_once,
            margins=section.margins,
            soft_labels=section.soft_labels,
        )
        rows = PreferenceRows(comparisons)
        if not self.caches_reference:
            return rows
        sizes = [sum(map(len, each.responses)) for each in examples]
        return PreferenceRows(comparisons, self.cached_reference(rows, sizes, comparisons_digest(examples)))

    def cached_reference(self, rows: Any, sizes: Sequence[int], digest: str) -> list[Tensor]:
        """The reference's log-probabilities of rows, read or computed. digest: of the rows."""
        cache = ReferenceCache(self._cache_folder())
        key = cache.key(digest, weights=self.pretrained.fingerprint, precision=self.precision)
        was_training = self.model.training
        self.model.eval()
        found = cached_logprobs(
            cache, key, self.model, rows, sizes, self.world, say=self.progress.say, started=hasattr(self, "fit")
        )
        self.model.train(was_training)
        return found

    def _cache_folder(self) -> Path:
        chosen = self.config.preference.reference_cache
        return self.run_dir / "reference" if chosen is None else Path(chosen)

    def build_fit(self) -> Fit[PreferenceBatch]:
        """Optimizer, update, batches and loop."""
        settings, (rank, size) = self.config.training, self.world.data_parallel
        batches = StepBatches.of(settings, self.rows(self.train_rows), rank=rank, world=size)
        if self.validation_rows:
            self.validation_batches = self.rows(self.validation_rows)
        return self.fit_of(
            update=self.update_of(self.model),
            batches=PreferenceBatches(batches, self.objective, self.world, observe=self.monitor.step),
            objective=with_router_loss(self.objective, self.backbone, settings.router_aux_loss),
            validation=self._validation() if self.validation_rows else None,
            identity=of_comparisons(
                self.config, comparisons_digest(self.train_rows), self.encoder, base=self.pretrained.fingerprint
            ),
            facts=self.facts(),
            method_state=self.method_state(),
        )

    def facts(self) -> dict[str, Any]:
        """The account of rows and tokens, for the log."""
        return {
            "rows": [report.summary() for report in self.data.reports],
            "tokens": {"training": self.train_tokens.counts()},
            "shared prompts": self.shares_prompts,
        }

    def _validation(self) -> Validation:
        return self.validation_of(
            self.watched("accuracy"),
            DIRECTIONS,
            num_rows=len(self.validation_rows),
            digest=comparisons_digest(self.validation_rows),
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses and implicit rewards of the validation rows, and metrics of generated answers; new notes are made."""
        was_training = self.model.training
        self.model.eval()
        metrics = {**self.rewarded(), **self.answered()}
        self.model.train(was_training)
        for note in self.monitor.validation(metrics):
            self.progress.warn(f"note: {note.message}")
            self.fit.record("note", note.as_json(), {})
        return metrics

    def rewarded(self) -> dict[str, float]:
        """The losses and implicit rewards of the validation comparisons."""
        metrics = self.means(self._validation_batches(*self.world.data_parallel))
        if "loss" not in metrics:
            metrics["loss"] = sum(weight * metrics[name] for name, weight in self.objective.weights.items())
        return metrics

    def answered(self) -> dict[str, float]:
        """Metrics of answers to the validation prompts, where this validation generates some; the answers go to
        samples.jsonl.
        """
        if self.generated is None or not self.generates_now():
            return {}
        step = self.fit.position.step
        with self.trained.whole():
            metrics, records = self.generated.measure(is_start=step == 0)
        if self.world.is_first:
            write_samples(self.run_dir / "samples.jsonl", step, records)
        return metrics

    def means(self, batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        """What the objective computes of batches, as means over all ranks. Batches marked False do not count."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for batch, counted in batches:
            found, number = self.objective.loss(batch), self.objective.counts(batch)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + (float(value) if counted else 0.0)
                counts[name] = counts.get(name, 0.0) + (number[name] if counted else 0.0)
        total, number = self.world.sum_floats(sums), self.world.sum_floats(counts)
        return {name: total[name] / number[name] if number[name] else 0.0 for name in total}

    def _validation_batches(self, rank: int, size: int) -> Iterator[tuple[PreferenceBatch, bool]]:
        """This rank's batches, and whether they count; with the ranks that AOT compares, over all that count."""
        batches = in_step(self.validation_batches, tokens=VALIDATION_TOKENS, rank=rank, world=size)
        if not self.objective.needs_ranks:
            yield from batches
            return
        found = list(batches)
        counted = iter(ranked([batch for batch, counts in found if counts], self.objective, self.world))
        for batch, counts in found:
            yield (next(counted), True) if counts else (replace(batch, sorted_reference=batch.pairs.margins), False)

    def exported(self) -> LanguageModel:
        return self.model.model

    def write_model(self) -> None:
        tokenizer = self.pretrained.tokenizer
        tokenizer.chat_template = self.encoder.template.source
        export_language_model(
            self.run_dir,
            self.model.model.causal,
            tokenizer,
            self.description(),
            lora=self.lora,
            base=self.config.data.pretrained_weights,
        )

    def description(self) -> dict[str, Any]:
        """What the model folder records."""
        return {
            "method": self.config.computation.method,
            "stop_tokens": list(self.encoder.template.stop_tokens),
            "max_length": self.max_length,
            **super().description(),
        }
