"""KTO: a policy learns from single answers that people found good or bad (Ethayarajh et al. 2024).

answers with a thumb → log π/ρ of each, and of mismatched pairs for the baseline → the loss of `training.kto`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loopos.data.answer_batches import AnswerBatch, AnswerRows, EncodedAnswer, with_mismatched
from loopos.data.batches import StepBatches, in_step
from loopos.data.digest import answers_digest
from loopos.data.preference_data import load_thumbs
from loopos.data.preference_tokens import PreferenceEncoder
from loopos.data.preferences import Comparison
from loopos.data.reading import DataReport
from loopos.data.thumbs import Thumbs
from loopos.methods.preference import DIRECTIONS, VALIDATION_TOKENS, PreferenceTrainer
from loopos.training.fit import Fit
from loopos.training.identity import of_comparisons
from loopos.training.kto import KtoBatches, KtoObjective
from loopos.training.objectives import with_router_loss


class KtoTrainer(PreferenceTrainer):
    """Trains a policy on answers with a thumb: `KtoTrainer(config).train()`."""

    def load_data(self) -> None:
        """Reads the answers, loads the model, and tokenizes by its template."""
        self.refuse_own_metrics()
        config, data = self.config, self.config.data
        self.data = load_thumbs(data, data.source, seed=config.training.seed)
        self.pretrained = self.load_pretrained(causal=True)
        self.max_length = self.longest_of(self.pretrained)
        self.encoder = PreferenceEncoder(data, self.pretrained.tokenizer, max_length=self.max_length)
        self.train_answers, self.train_tokens = self._encoded(self.data.train)
        self.validation_answers: list[EncodedAnswer] = []
        good = sum(each.desirable for each in self.train_answers)
        lines = [
            self.pretrained.summary,
            *self.data.summary,
            self.encoder.template.summary,
            f"tokens: {self.train_tokens.summary()}",
            f"answers: {good} desirable, {len(self.train_answers) - good} undesirable",
        ]
        if config.validates and self.data.validation:
            self.validation_answers, report = self._encoded(self.data.validation)
            lines.append(f"validation tokens: {report.summary()}")
        self.progress.say(*lines)

    def _encoded(self, examples: Sequence[Thumbs]) -> tuple[list[EncodedAnswer], DataReport]:
        """Every answer of the rows as tokens, with a mismatched one."""
        rows, report = self.encoder.comparisons([each.comparison for each in examples])
        answers = [
            EncodedAnswer(row.prompt, response, desirable, row.index, mask=row.mask(number))
            for row in rows
            for number, (response, desirable) in enumerate(
                zip(row.responses, examples[row.index].desirable, strict=True)
            )
        ]
        return with_mismatched(answers, seed=self.config.training.seed), report

    def build_objective(self) -> KtoObjective:
        section = self.config.preference
        return KtoObjective(
            self.model,
            self.config.beta,
            section.desirable_weight,
            section.undesirable_weight,
            reference=self.reference(),
        )

    def answers(self, answers: list[EncodedAnswer]) -> tuple[AnswerRows, AnswerRows]:
        """The answers, and the same rows with their mismatched ones, as batches take them."""
        digest, found = answers_digest(answers), []
        for mismatched in (False, True):
            rows = AnswerRows(answers, self.device, mismatched)
            if self.config.caches_reference:
                sizes = [len(rows.counted(row)) for row in range(len(answers))]
                cached = self.cached_reference(rows, sizes, f"{digest} {mismatched}")
                rows = AnswerRows(answers, self.device, mismatched, cached)
            found.append(rows)
        return found[0], found[1]

    def build_fit(self) -> Fit[AnswerBatch]:  # type: ignore[override]
        """Optimizer, update, batches and loop."""
        settings, (rank, size) = self.config.training, self.world.data_parallel
        rows, mismatched = self.answers(self.train_answers)
        batches = StepBatches.of(settings, rows, rank=rank, world=size)
        if self.validation_answers:
            self.validation_parts = self.answers(self.validation_answers)
        digest = answers_digest(self.train_answers)
        return self.fit_of(
            update=self.update_of(self.model),
            batches=self.followed(
                KtoBatches(batches, mismatched, self.objective, self.world, observe=self.monitor.step)
            ),
            objective=with_router_loss(self.objective, self.backbone, settings.router_aux_loss),
            validation=self.validation_of(
                self.watched("loss"),
                DIRECTIONS,
                num_rows=len(self.validation_answers),
                digest=answers_digest(self.validation_answers),
            )
            if self.validation_answers
            else None,
            identity=of_comparisons(self.config, digest, self.encoder, base=self.pretrained.fingerprint),
            facts=self.facts(),
            method_state=self.method_state,
        )

    def validation_comparisons(self) -> list[tuple[list[int], Comparison, int | None]]:
        examples: Sequence[Thumbs] = self.data.validation
        found = []
        for each in self.validation_answers:
            thumbs = examples[each.index]
            good = next((number for number, desirable in enumerate(thumbs.desirable) if desirable), None)
            found.append((each.prompt, thumbs.comparison, good))
        return found

    def rewarded(self) -> dict[str, float]:
        """The loss and the implicit rewards of the validation answers; the baseline is taken over all of them."""
        rank, size = self.world.data_parallel
        rows, mismatched = self.validation_parts
        ratios: list[float] = []
        for batch, counts in in_step(mismatched, tokens=VALIDATION_TOKENS, rank=rank, world=size):
            own = self.objective.ratios(batch).tolist()
            ratios += own if counts else []
        gathered: list[Any] = self.world.gather_data_parallel(ratios)
        every = sorted(value for part in gathered for value in part)
        baseline = max(0.0, sum(every) / len(every))
        batches = in_step(rows, tokens=VALIDATION_TOKENS, rank=rank, world=size)
        metrics = self.means((replace(batch, baseline=baseline), counts) for batch, counts in batches)
        metrics["reward_margin"] = metrics["rewards_desirable"] - metrics["rewards_undesirable"]
        return metrics
