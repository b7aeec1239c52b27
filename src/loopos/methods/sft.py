"""Supervised fine-tuning: a language model learns the responses of conversations, instructions, completions or texts.

    rows → chat template → tokens with weights → next-token loss → update; validation gives the loss and samples

Enters: an `SftConfig`. Leaves: a run folder with checkpoints, events, samples.jsonl, a report and the trained language
model. Left out: the loop (`training.fit`), the reading of data (`data.supervised`), generation itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from loopos.config.diagnostics import UserError
from loopos.config.sft import SftConfig
from loopos.data.batches import Batch, PackedRows, StepBatches
from loopos.data.digest import rows_digest
from loopos.data.reading import DataReport
from loopos.data.stored_logprobs import encoder_of
from loopos.data.supervised import load_supervised
from loopos.data.supervised_rows import Example
from loopos.data.tokens import Encoded
from loopos.evaluation.answer_check import SampleAnswers, chats_of
from loopos.evaluation.metrics import METRIC_DIRECTION
from loopos.evaluation.reasoning import Reasoner
from loopos.methods.base import Trainer
from loopos.models.adapters import set_trained_language_model
from loopos.models.folders import export_language_model
from loopos.models.language_model import LanguageModel
from loopos.training.fit import Fit
from loopos.training.identity import Identity, of_sft
from loopos.training.objectives import NextToken, mean_loss, with_router_loss
from loopos.training.progress import write_samples
from loopos.training.validation import Validation

SftConfigT = TypeVar("SftConfigT", bound=SftConfig)
Records: TypeAlias = list[dict[str, Any]]


class SftTrainer(Trainer[SftConfigT]):
    """Fine-tunes a language model on what a good response is: `SftTrainer(config).train()`."""

    def load_data(self) -> None:
        """Reads the rows, loads the model, and tokenizes by its template; prints what was decided."""
        config, data = self.config, self.config.data
        self.data = load_supervised(data, seed=config.training.seed)
        self.step_format = self.data.step_format
        self.pretrained = pretrained = self.load_pretrained(causal=True)
        self.tokenizer = pretrained.tokenizer
        self.max_length = self.longest_of(pretrained)
        self.encoder = encoder_of(data, self.step_format, self.tokenizer, max_length=self.max_length)
        self.template = self.encoder.template
        self.train_rows, self.train_tokens = self.encode(self.learned())
        self.validation_rows: list[Encoded] = []
        self.validation_tokens = DataReport(trained_tokens=0)
        if config.validates and self.data.validation:
            self.validation_rows, self.validation_tokens = self.encode(self.data.validation)
        self.chats = chats_of(self.data.validation)[: config.evaluation.samples] if config.validates else []
        tokens = f"tokens: {self.train_tokens.summary()}"
        self.progress.say(pretrained.summary, *self.data.summary, self.template.summary, tokens)

    def learned(self) -> list[Example]:
        """The examples to learn from."""
        return self.data.train

    def encode(self, examples: Sequence[Example]) -> tuple[list[Encoded], DataReport]:
        """Tokens and weights of examples, by the config's rules. Raises `DataError`."""
        rows, report = self.encoder(examples)
        return [row.encoded() for row in rows], report

    def build_model(self) -> LanguageModel:
        """The language model, what trains, the number format, and the engine that generates with the same weights."""
        settings = self.config.training
        self.choose_precision()
        self.base = self.pretrained.fingerprint
        self.model = LanguageModel(self.pretrained.model, attention=self.config.model.attention)
        backbone = self.model.backbone
        self.print_attention(backbone)
        initially_frozen = set_trained_language_model(
            self.model.causal, backbone.model, settings, self.config.data.adapter
        )
        if settings.gradient_checkpointing:
            self.model.causal.activation_checkpointing_enable()
        self.train_weights(self.model, initially_frozen=initially_frozen, rows=self.rows_that_train(self.pretrained))
        self.progress.say(self.trained.summary())
        self.answers: SampleAnswers | None = None
        if self.generates():
            with self.trained.whole():
                reasoner = Reasoner(
                    self.model.causal, self.tokenizer, template=self.template, step_format=self.step_format
                )
            self.answers = self.answers_of(reasoner)
            self.progress.say(reasoner.engine.summary)
        return self.model

    def generates(self) -> bool:
        """Whether the run ever generates."""
        return bool(self.chats)

    def answers_of(self, reasoner: Reasoner) -> SampleAnswers:
        """What validation generates, with the model that trains."""
        return SampleAnswers(reasoner, self.config.generation, seed=self.config.training.seed)

    def build_fit(self) -> Fit[Batch]:
        """Optimizer, update, batches and loop."""
        return self.fit_on(self.run_dir, self.train_rows)

    def fit_on(self, folder: Path, rows: Sequence[Encoded]) -> Fit[Batch]:
        """The training on these rows, in this folder."""
        settings, (rank, size) = self.config.training, self.world.data_parallel
        return self.fit_of(
            run_dir=folder,
            update=self.update_of(self.model),
            batches=StepBatches.of(settings, PackedRows(rows, None, self.device), rank=rank, world=size),
            objective=with_router_loss(NextToken(self.model), self.model.backbone, settings.router_aux_loss),
            validation=self._validation() if self.validation_rows else None,
            identity=self.identity_of(rows),
            facts=self._facts(),
        )

    def identity_of(self, rows: Sequence[Encoded]) -> Identity:
        """What a resumed run must have in common with this one."""
        return of_sft(self.config, rows, self.encoder, base=self.base)

    def _facts(self) -> dict[str, Any]:
        """The account of rows and tokens, for the log: what was read is used, or dropped for a counted reason."""
        reports = {"training": self.train_tokens, "validation": self.validation_tokens}
        rows = [report.summary() for report in self.data.reports]
        return {"rows": rows, "tokens": {name: each.counts() for name, each in reports.items()}}

    def default_metric(self) -> str:
        """The metric that chooses the best checkpoint where the config names none."""
        return "loss"

    def _validation(self) -> Validation:
        metrics = self.watched(self.default_metric())
        self.check_metrics(metrics)
        return self.validation_of(
            metrics, METRIC_DIRECTION, num_rows=len(self.validation_rows), digest=rows_digest(self.validation_rows)
        )

    def check_metrics(self, names: tuple[str, str]) -> None:
        """Raises `UserError` for metrics that the validation rows cannot give. names: as `watched` returns them."""
        if self.metrics and not self.chats:
            raise UserError(
                "metrics: no validation row asks for an answer; expected conversations or prompts among the validation "
                "rows, and evaluation.samples above 0"
            )

    def validate(self) -> dict[str, float]:
        """Loss on the validation rows and, every `evaluation.every` validations, generated answers: their metrics, and
        samples for the report.
        """
        losses = self.losses()
        if self.answers is None or not self.generates_now():
            return losses
        with self.trained.whole():
            metrics, records = self.generated(self.answers)
        if self.world.is_first:
            write_samples(self.fit.run_dir / "samples.jsonl", self.fit.position.step, records)
        answers = [record["answer"] if "answer" in record else record["response"] for record in records]
        references = [record["expected"] if "expected" in record else record["reference"] for record in records]
        return self.with_own_metrics({**losses, **metrics}, answers, references)

    def losses(self) -> dict[str, float]:
        """What is computed of the validation rows' own answers."""
        return {"loss": mean_loss(NextToken(self.model), self.validation_rows, device=self.device, world=self.world)}

    def generated(self, answers: SampleAnswers) -> tuple[dict[str, float], Records]:
        """Metrics of generated answers, and the answers for samples.jsonl; the same on every process."""
        world = self.world
        return {}, answers.samples(self.chats, shard=world.data_parallel, gather=world.gather_data_parallel)

    def exported(self) -> LanguageModel:
        return self.model

    def write_model(self) -> None:
        # The model writes its format wherever it is opened.
        self.tokenizer.chat_template = self.template.source
        base, causal = self.config.data.pretrained_weights, self.model.causal
        export_language_model(self.run_dir, causal, self.tokenizer, self.description(), lora=self.lora, base=base)

    def description(self) -> dict[str, Any]:
        """What the model folder records of how its responses are written."""
        return {
            "method": self.config.computation.method,
            "step_format": dataclasses.asdict(self.step_format),
            "stop_tokens": list(self.template.stop_tokens),
            "train_on": self.config.data.train_on,
            "max_length": self.max_length,
            **super().description(),
        }
