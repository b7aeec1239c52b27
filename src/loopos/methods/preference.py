"""Preference optimization: a policy learns from comparisons directly, without a reward model or sampling.

    comparisons → chat template → tokens → log π and log ρ of both responses → a loss of `functional.preference_losses`

DPO (Rafailov et al. 2023) and its relatives; the method's name is a preset of `preference.loss` and `preference.beta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopos.config.diagnostics import UserError
from loopos.config.figures import figure
from loopos.config.preference import PreferenceConfig
from loopos.data.batches import ComparisonRows, StepBatches, StepSource, in_step
from loopos.data.digest import comparisons_digest
from loopos.data.preference_data import PreferenceData, load_comparisons, load_prompts_to_compare
from loopos.data.preference_tokens import EncodedComparison, PreferenceEncoder
from loopos.data.preferences import Comparison
from loopos.data.response_batches import PreferenceBatch, PreferenceRows
from loopos.functional.language_loss import TokenLogprobs
from loopos.functional.packing import PackedLayout
from loopos.functional.preference_losses import LossSettings
from loopos.generation.engine import Engine
from loopos.methods.base import Direction, Trainer
from loopos.models.active_adapters import AdapterView
from loopos.models.adapters import set_trained_language_model
from loopos.models.attention import prompt_runs_once
from loopos.models.folders import descriptions_together, export_language_model
from loopos.models.language_model import LanguageModel
from loopos.models.load import NUMBER_FORMATS
from loopos.rl.collector import Collector, sampling_of
from loopos.rl.preference_check import (
    GeneratedAnswers,
    GeneratingPolicy,
    PreferenceState,
    ValidationPrompts,
    start_copy,
)
from loopos.rl.preference_monitor import PreferenceMonitor
from loopos.rl.preference_rounds import OnlineSources, RoundBatches, RoundWriter, plan_of
from loopos.rl.rewards import RewardRun, Rewards
from loopos.rl.roles import Reference, cast_frozen, ensemble_of, without_dropout
from loopos.rl.rollouts import RolloutPlan
from loopos.rl.workers.protocol import LocalRollouts
from loopos.training.fit import Fit, RunPlan
from loopos.training.identity import of_comparisons
from loopos.training.objectives import means_of, with_router_loss
from loopos.training.preference_objective import PreferenceBatches, PreferenceObjective, ranked
from loopos.training.progress import write_samples
from loopos.training.reference import FollowedBatches, ReferenceCache, ReferenceCopy, cached_logprobs
from loopos.training.run_state import MethodState, MethodStates
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

    def __init__(self, model: LanguageModel, *, collisions: bool = False) -> None:
        """collisions: as `token_logprobs` has it."""
        super().__init__()
        self.model, self.collisions = model, collisions

    def forward(self, ids: Tensor, layout: PackedLayout, positions: Tensor, targets: Tensor) -> TokenLogprobs:
        """Log-probabilities of `targets` `[M]` after `positions` `[M]`, and entropies, nats. ids `[T]` → `[M]` each."""
        hidden = self.model.backbone(ids, layout)[positions]
        return self.model.logprobs(hidden, targets, collisions=self.collisions)


class PreferenceTrainer(Trainer[PreferenceConfig]):
    """Trains a policy on comparisons: `PreferenceTrainer(config).train()`."""

    data: PreferenceData[Any]
    sources: OnlineSources | None = None

    def load_data(self) -> None:
        """Reads the comparisons, loads the model, and tokenizes by its template."""
        self.refuse_own_metrics()
        config, data = self.config, self.config.data
        load = load_comparisons if data.prompts is None else load_prompts_to_compare
        self.data = load(data, data.source, seed=config.training.seed)
        self.pretrained = self.load_pretrained(causal=True)
        self.max_length = self.longest_of(self.pretrained)
        self.encoder = PreferenceEncoder(data, self.pretrained.tokenizer, max_length=self.max_length)
        self.train_rows: list[EncodedComparison] = []
        if config.online is not None:
            self.sources = OnlineSources.open(config, self.data.train, self.encoder)
            self.train_tokens = self.sources.tokens
        else:
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
        initially_frozen = set_trained_language_model(
            language_model.causal, backbone.model, settings, self.config.data.adapter
        )
        if settings.gradient_checkpointing:
            language_model.causal.activation_checkpointing_enable()
        without_dropout(language_model)
        self.states: dict[str, MethodState] = {}
        self.model = Policy(language_model, collisions=self.config.weighs_pairs)
        self.judges = [] if self.sources is None else [each.model for each in self.sources.rewards]
        for judge in self.judges:
            without_dropout(judge.requires_grad_(False))
            cast_frozen(judge, NUMBER_FORMATS["bf16"] if self.precision == "bf16" else None)
        frozen = [*self.judges, *([] if start is None else [start])]
        rows = self.rows_that_train(self.pretrained)
        self.train_weights(self.model, initially_frozen=initially_frozen, frozen=frozen, rows=rows)
        self.progress.say(self.trained.summary())
        self.objective = self.build_objective()
        self.monitor, self.generated = PreferenceMonitor(self.config), self.build_answers(start)
        self.states["validation"] = PreferenceState(self.monitor, self.generated, self.progress.warn)
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

    def reference(self) -> Callable[[Any], Tensor] | None:
        """Computes the reference's log-probabilities of a batch: by its own copy of the weights, or without the
        adapters; None where they are cached or not needed.
        """
        config = self.config
        if config.caches_reference or not config.needs_reference:
            return None
        if config.copies_reference:
            sync = config.preference.sync_reference
            every, alpha = (None, 1.0) if sync is None else (sync.every, sync.alpha)
            copied = ReferenceCopy(self.model, self.trained.master_weights, every=every, alpha=alpha)
            self.states["reference"] = copied
            return copied
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
            reference=self.reference(),
            length_alpha=section.length_alpha,
            wpo=config.weighs_pairs,
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
        if not self.config.caches_reference:
            return rows
        sizes = [sum(len(each.counted(number)) for number in range(len(each.responses))) for each in examples]
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
        batches: StepSource[PreferenceBatch]
        if self.sources is None:
            plan, learned_from = RunPlan(), comparisons_digest(self.train_rows)
            batches = StepBatches.of(settings, self.rows(self.train_rows), rank=rank, world=size)
        else:
            rounds = plan_of(self.config, num_prompts=len(self.sources.prompts), rank=rank, world=size)
            rewards = self.rewards(self.sources, rounds.iterations)
            learned_from = self.sources.digest(with_columns=rewards.read_rows)
            plan = RunPlan(steps=rounds.iterations * rounds.minibatches)
            writer = self.round_writer(self.sources, rounds, rewards)
            self.states["rounds"] = batches = RoundBatches(rounds, writer, self.rows)
        if self.validation_rows:
            self.validation_batches = self.rows(self.validation_rows)
        return self.fit_of(
            plan=plan,
            update=self.update_of(self.model),
            batches=self.followed(PreferenceBatches(batches, self.objective, self.world, observe=self.monitor.step)),
            objective=with_router_loss(self.objective, self.backbone, settings.router_aux_loss),
            validation=self._validation() if self.validation_rows else None,
            identity=of_comparisons(self.config, learned_from, self.encoder, base=self._base()),
            facts=self.facts(),
            method_state=self.method_state,
        )

    def rewards(self, sources: OnlineSources, iterations: int) -> Rewards:
        """The reward that compares the policy's own answers. iterations: rounds of the run."""
        config, judge = self.config, ensemble_of(self.judges)
        assert config.online is not None
        description = descriptions_together([each.description for each in sources.rewards])
        tokenizer, run = self.pretrained.tokenizer, RewardRun(self.run_dir, self.world.rank, iterations)
        return Rewards.of(judge, description, config.reward, config.online, self.device, tokenizer, run)

    def round_writer(
        self, sources: OnlineSources, plan: RolloutPlan, rewards: Rewards
    ) -> Callable[[int], list[EncodedComparison]]:
        """Writes the comparisons of a round with the policy, and logs what it wrote."""
        config, data_parallel = self.config, self.world.data_parallel
        assert config.online is not None
        with self.trained.whole():
            engine = LocalRollouts(
                Engine(self.model.model.causal, self.pretrained.tokenizer), data_parallel=data_parallel
            )
        self.progress.say(engine.summary)
        origins, gather = sources.encoder.origins, self.world.gather_data_parallel
        collector = Collector(engine, None, rewards, device=self.device, origins=origins, gather=gather)
        stops = self.encoder.template.stop_tokens
        sampling = sampling_of(config.online, stop_token_ids=stops, seed=config.training.seed)
        writer = RoundWriter(collector, plan, sources.prompts, sampling, self._record_round)

        def write(number: int) -> list[EncodedComparison]:
            with self.trained.whole():
                return writer(number)

        return write

    def _record_round(self, metrics: Mapping[str, float], seconds: float) -> None:
        self.fit.record("rollout", metrics, {"seconds": seconds})
        shown = [name for name in ("reward", "pairs", "no_signal", "response_length") if name in metrics]
        figures = " · ".join(f"{name} {figure(metrics[name])}" for name in shown)
        self.progress.say(f"round {int(metrics['iteration']) + 1}: {figures}")

    def _base(self) -> str:
        """The fingerprints of the policy's weights and of the reward models'."""
        judged_by = [] if self.sources is None else self.sources.fingerprints
        return ", rewards ".join([self.pretrained.fingerprint, *judged_by])

    def followed(self, batches: Any) -> Any:
        """The batches, after whose steps the reference moves if it does."""
        copied = self.states.get("reference")
        return FollowedBatches(batches, copied) if isinstance(copied, ReferenceCopy) and copied.every else batches

    @property
    def method_state(self) -> MethodStates:
        """What a checkpoint has beyond weights and optimizer."""
        return MethodStates(self.states)

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
        """As `means_of`."""
        return means_of(self.objective, batches, self.world)

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
