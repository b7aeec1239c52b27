"""Distillation: a student learns the next-token distributions of a teacher with the same tokenizer.

    rows → tokens (off-policy), or prompts → the student's own answers (on-policy) → both models' distributions at each
    trained token → a divergence of `functional.distillation_loss` → update; validation gives KL and perplexity

After Hinton et al. 2015, and Agarwal et al. 2024 (GKD). The teacher runs beside the student, or its most likely tokens
are stored in the rows. Rows, template, samples and export are those of `sft`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from loopos.config.diagnostics import UserError
from loopos.config.distillation import DistillationConfig
from loopos.config.figures import figure
from loopos.data.batches import StepBatches, StepSource, in_step
from loopos.data.distillation_rows import DistillationBatch, DistillationRows, DistilledRow
from loopos.data.stored_logprobs import StoredEncoder
from loopos.data.supervised_rows import Example, PlainText
from loopos.data.supervised_tokens import prompt_tokens
from loopos.data.tokens import Encoded
from loopos.functional.distillation_loss import TopLogprobs
from loopos.generation.engine import Engine
from loopos.methods.base import Direction
from loopos.methods.sft import SftTrainer
from loopos.models.folders import check_same_tokens
from loopos.models.language_model import LanguageModel
from loopos.models.load import NUMBER_FORMATS, Pretrained, load_pretrained
from loopos.rl.collector import sampling_of
from loopos.rl.distillation_rounds import AnswerRounds, AnswerWriter, plan_of
from loopos.rl.roles import cast_frozen, without_dropout
from loopos.rl.workers.protocol import LocalRollouts
from loopos.training.distillation_objective import DistillationObjective, SampledObjective
from loopos.training.fit import Fit, RunPlan
from loopos.training.identity import Identity, of_distillation
from loopos.training.objectives import means_of, with_router_loss
from loopos.training.run_state import MethodStates
from loopos.training.trained_weights import TrainedWeights
from loopos.training.validation import Validation

DIRECTIONS: dict[str, Direction] = {
    "loss": "min",
    "forward_kl": "min",
    "reverse_kl": "min",
    "nll": "min",
    "perplexity": "min",
    "top_token_agreement": "max",
}
# Tokens of one forward pass of validation.
_TOKENS = 2048


class DistillationTrainer(SftTrainer[DistillationConfig]):
    """Trains a student on what a teacher would say: `DistillationTrainer(config).train()`."""

    taught: Pretrained | None = None
    teacher: LanguageModel | None = None

    def load_data(self) -> None:
        super().load_data()
        self.open_teacher()
        self.prompts = self.prompts_of(self.train_rows) if self.config.is_on_policy else []

    def open_teacher(self) -> None:
        """Loads the teacher, if the rows do not have its log-probabilities. Raises `UserError` for one with other
        tokens.
        """
        location = self.config.data.teacher
        if location is None:
            self.progress.say("teacher: its log-probabilities in the rows")
            return
        self.taught = load_pretrained(location, causal=True, trust_remote_code=self.trust_remote_code)
        check_same_tokens(self.tokenizer, self.taught.tokenizer, f"data.teacher: {location}", of="student")
        self.progress.say(f"teacher: {self.taught.summary}")

    def prompts_of(self, rows: Sequence[Encoded]) -> list[list[int]]:
        """What the student answers: of each row all before its last answer. Raises `UserError` for a row without a
        prompt, and for one that leaves no room.
        """
        found = []
        for row in rows:
            example = self.learned()[row.index]
            if isinstance(example, PlainText):
                raise UserError(
                    f"{example.row.location}: got plain text with distillation.on_policy_fraction "
                    f"{self.config.distillation.on_policy_fraction:g}; expected rows with a prompt to answer"
                )
            found.append(prompt_tokens(self.tokenizer, example, template=self.template))
            if self.max_length is not None and len(found[-1]) >= self.max_length:
                raise UserError(
                    f"{example.row.location}: a prompt of {len(found[-1])} tokens leaves no room for an answer; "
                    f"expected fewer than {self.max_length} (training.max_length)"
                )
        return found

    def train_weights(self, model: Any, **choices: Any) -> TrainedWeights:
        """Places student and teacher. Raises `UserError` if they are sharded."""
        if self.taught is not None:
            cast_frozen(self.taught.model.requires_grad_(False), NUMBER_FORMATS[self._teacher_format])
            self.teacher = LanguageModel(self.taught.model, attention=self.config.model.attention)
            without_dropout(self.teacher)
        if self.config.is_sampled:
            without_dropout(model)
        frozen = [] if self.teacher is None else [self.teacher]
        trained = super().train_weights(model, frozen=frozen, **choices)
        if trained.master_weights.sharding is not None:
            raise UserError(
                "distributed.mode: distillation reads the output layers of student and teacher whole in each process, "
                'and this model is sharded; expected "replicate"'
            )
        return trained

    @property
    def _teacher_format(self) -> str:
        return "bf16" if self.precision == "bf16" else "fp32"

    def rows(self, encoded: Sequence[Encoded], examples: Sequence[Example]) -> list[DistilledRow]:
        """Rows with the teacher's stored candidates, if it has stored any."""
        encoder = self.encoder
        if not isinstance(encoder, StoredEncoder):
            return [DistilledRow.of(row) for row in encoded]
        found = []
        for row in encoded:
            stored = encoder.stored(examples[row.index].row)
            # The end of an answer is cut with its row, and the first token of all has none before it.
            ids = torch.tensor(stored.ids.astype("int64"))
            logprobs = torch.tensor(stored.logprobs.astype("float32"))
            first, number = 0 if stored.prompt else 1, sum(map(bool, row.weights or ()))
            part = slice(first, first + number)
            found.append(DistilledRow.of(row, TopLogprobs(ids[part], logprobs[part])))
        return found

    @cached_property
    def objective(self) -> DistillationObjective | SampledObjective:
        """What the student learns by."""
        section = self.config.distillation
        if self.config.is_sampled:
            assert self.teacher is not None, "checked by the config"
            return SampledObjective(self.model, self.teacher, section.temperature)
        return self.measured

    @cached_property
    def measured(self) -> DistillationObjective:
        """What validation computes of the data's own answers; for a loss of sampled tokens the reverse KL."""
        section = self.config.distillation
        name = "reverse_kl" if self.config.is_sampled else section.loss
        return DistillationObjective(self.model, self.teacher, name, section.beta, section.temperature)

    def build_fit(self) -> Fit[DistillationBatch]:  # type: ignore[override]
        """Optimizer, update, batches and loop."""
        settings, (rank, size) = self.config.training, self.world.data_parallel
        rows = self.rows(self.train_rows, self.learned())
        plan, states = RunPlan(), {}
        batches: StepSource[DistillationBatch]
        if self.config.is_on_policy:
            rounds = plan_of(self.config, num_rows=len(rows), rank=rank, world=size)
            plan = RunPlan(steps=rounds.iterations * rounds.minibatches)
            made = AnswerRounds(rounds, self.writer(rounds, rows), lambda found: DistillationRows(found, self.device))
            batches = states["rounds"] = made
        else:
            batches = StepBatches.of(settings, DistillationRows(rows, self.device), rank=rank, world=size)
        if self.validation_rows:
            self.measured_rows = DistillationRows(self.rows(self.validation_rows, self.data.validation), self.device)
        return self.fit_of(
            plan=plan,
            update=self.update_of(self.model),
            batches=batches,
            objective=with_router_loss(self.objective, self.model.backbone, settings.router_aux_loss),
            validation=self._validation() if self.validation_rows else None,
            identity=self.identity_of(self.train_rows),
            facts=self._facts(),
            method_state=MethodStates(states) if states else None,
        )

    def writer(self, plan: Any, rows: Sequence[DistilledRow]) -> Any:
        """Writes the rows of a round with the student."""
        with self.trained.whole():
            engine = LocalRollouts(Engine(self.model.causal, self.tokenizer), data_parallel=self.world.data_parallel)
        self.progress.say(engine.summary)
        stops, seed = self.template.stop_tokens, self.config.training.seed
        return AnswerWriter(
            engine,
            plan,
            rows,
            self.prompts,
            sampling_of(self.config.online, stop_token_ids=stops, seed=seed),
            fraction=self.config.distillation.on_policy_fraction,
            longest=self.max_length,
            gather=self.world.gather_data_parallel,
            record=self._record_round,
        )

    def _record_round(self, metrics: Mapping[str, float], seconds: float) -> None:
        self.fit.record("rollout", metrics, {"seconds": seconds})
        shown = (f"{name} {figure(metrics[name])}" for name in ("written", "response_length", "eos_rate"))
        self.progress.say(f"round {int(metrics['iteration']) + 1}: {' · '.join(shown)}")

    def identity_of(self, rows: Sequence[Encoded]) -> Identity:
        if self.taught is not None:
            teacher = self.taught.fingerprint
        else:
            digest = hashlib.sha256()
            for row in self.rows(rows, self.learned()):
                assert row.top is not None
                digest.update(row.top.ids.numpy().tobytes() + row.top.logprobs.numpy().tobytes())
            teacher = digest.hexdigest()
        return of_distillation(self.config, rows, self.encoder, base=self.base, teacher=teacher)

    def default_metric(self) -> str:
        return self.config.default_metric

    def validation_of(self, metrics: tuple[str, str], known: Any, **choices: Any) -> Validation:
        return super().validation_of(metrics, DIRECTIONS, **choices)

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Divergences, agreement and perplexity on the data's own answers."""
        rank, size = self.world.data_parallel
        was_training = self.model.training
        self.model.eval()
        batches = in_step(self.measured_rows, tokens=_TOKENS, rank=rank, world=size)
        found = means_of(self.measured, batches, self.world)
        self.model.train(was_training)
        return {**found, "perplexity": math.exp(found["nll"])}

    def description(self) -> dict[str, Any]:
        location = self.config.data.teacher
        return {**super().description(), "teacher": location}
