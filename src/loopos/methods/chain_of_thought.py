"""Chain-of-thought training: problem → steps → answer, learned from demonstrations, checked by generating.

    rows → chat template + step format → tokens with weights → next-token loss → update; validation generates and checks

Enters: a `ChainOfThoughtConfig`. Leaves: a run folder with checkpoints, events, samples.jsonl, a report and the trained
language model. After Wei et al. 2022; rounds of self-improvement after Zelikman et al. 2022 (STaR). Left out: the loop
(`training.fit`), the reading of data (`data.supervised`), generation itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.diagnostics import UserError
from loopos.data.batches import Batch, PackedRows, StepBatches
from loopos.data.demonstrations import Demonstration
from loopos.data.digest import rows_digest
from loopos.data.reading import DataReport
from loopos.data.supervised import load_supervised
from loopos.data.supervised_rows import Example
from loopos.data.supervised_tokens import SupervisedEncoder
from loopos.data.tokens import Encoded
from loopos.evaluation.answer_check import AnswerCheck, chats_of
from loopos.evaluation.found_chains import find_chains
from loopos.evaluation.metrics import METRIC_DIRECTION
from loopos.evaluation.reasoning import Reasoner
from loopos.evaluation.report import write_report
from loopos.methods.base import Trainer
from loopos.models.adapters import set_trained_language_model
from loopos.models.folders import export_language_model
from loopos.models.language_model import LanguageModel
from loopos.storage.durable import explain_disk_full
from loopos.training.fit import Fit
from loopos.training.identity import of_reasoning
from loopos.training.objectives import NextToken, mean_loss, with_router_loss
from loopos.training.progress import write_samples
from loopos.training.random_states import seed_everything
from loopos.training.run_state import FitResult
from loopos.training.trained_weights import take_chosen
from loopos.training.validation import Validation, best_of


class ChainOfThought(Trainer[ChainOfThoughtConfig]):
    """Teaches a language model to reason in steps: `ChainOfThought(config).train()`.

    One training, then `self_improvement.rounds` more, each in its own folder and from the pretrained weights.
    """

    def run_fit(self, *, resume: bool) -> FitResult:
        self.results = [self.train_on(self.run_dir, self.train_rows, resume=resume)]
        rounds = self.config.self_improvement.rounds if self.config.self_improvement is not None else 0
        while not self.results[-1].interrupted and len(self.results) <= rounds:
            self.results.append(self.improve(len(self.results), resume=resume))
        return self.results[-1]

    def load_data(self) -> None:
        """Reads the rows, loads the model, and tokenises by its template; says what was decided."""
        config, settings, data = self.config, self.config.training, self.config.data
        self.data = load_supervised(data, seed=settings.seed)
        self.step_format = self.data.step_format
        self.pretrained = pretrained = self.load_pretrained(causal=True)
        self.tokenizer = pretrained.tokenizer
        self.max_length = self.longest_of(pretrained)
        self.encoder = SupervisedEncoder(data, self.step_format, self.tokenizer, max_length=self.max_length)
        self.template = self.encoder.template
        self.train_rows, self.train_tokens = self.encode(self._worked())
        self.validation_rows: list[Encoded] = []
        self.validation_tokens = DataReport(trained_tokens=0)
        if config.validates and self.data.validation:
            self.validation_rows, self.validation_tokens = self.encode(self.data.validation)
        problems = [example for example in self.data.validation if isinstance(example, Demonstration)]
        self.problems = problems[: config.evaluation.problems] if config.generates else []
        self.chats = chats_of(self.data.validation)[: config.evaluation.samples] if config.validates else []
        tokens = f"tokens: {self.train_tokens.summary()}"
        self.progress.say(pretrained.summary, *self.data.summary, self.template.summary, tokens)
        if self.problems:
            self.progress.say(f"validation generates answers to {len(self.problems)} problems")

    def _worked(self) -> list[Example]:
        """The training rows to learn from. Under self-improvement, problems without steps are left out: chains are
        sampled for them, and learning them as they are would teach the model to answer without reasoning.
        """
        worked = [e for e in self.data.train if not isinstance(e, Demonstration) or e.steps]
        return worked if self.config.self_improvement is not None and worked else self.data.train

    def encode(self, examples: Sequence[Example]) -> tuple[list[Encoded], DataReport]:
        """Tokens and weights of examples, by the config's rules. Raises `DataError`."""
        rows, report = self.encoder(examples)
        return [row.encoded() for row in rows], report

    def build_model(self) -> LanguageModel:
        """The language model, what trains, the number format, and the reasoner that generates with the same weights."""
        settings = self.config.training
        self.choose_precision()
        self.base = self.pretrained.fingerprint
        self.model = LanguageModel(self.pretrained.model, attention=self.config.model.attention)
        backbone = self.model.backbone
        self.print_attention(backbone)
        initially_frozen = set_trained_language_model(self.model.causal, backbone.model, settings)
        if settings.gradient_checkpointing:
            self.model.causal.activation_checkpointing_enable()
        self.train_weights(self.model, initially_frozen=initially_frozen)
        self.progress.say(self.trained.summary())
        self.check: AnswerCheck | None = None
        if self.problems or self.chats or self.config.self_improvement is not None:
            causal = self.model.causal
            with self.trained.whole():
                reasoner = Reasoner(causal, self.tokenizer, template=self.template, step_format=self.step_format)
            self.check = AnswerCheck(reasoner, self.config.generation, self.config.evaluation, seed=settings.seed)
            self.progress.say(reasoner.engine.summary)
        return self.model

    def train_on(self, folder: Path, rows: Sequence[Encoded], *, resume: bool) -> FitResult:
        """One training of the model on these rows, in its own folder."""
        self.folder, self.rows = folder, rows
        return super().run_fit(resume=resume)

    def build_fit(self) -> Fit[Batch]:
        """Optimizer, update, batches and loop."""
        settings, (rank, size) = self.config.training, self.world.data_parallel
        return self.fit_of(
            run_dir=self.folder,
            update=self.update_of(self.model),
            batches=StepBatches.of(settings, PackedRows(self.rows, None, self.device), rank=rank, world=size),
            objective=with_router_loss(NextToken(self.model), self.model.backbone, settings.router_aux_loss),
            validation=self._validation() if self.validation_rows else None,
            identity=of_reasoning(self.config, self.rows, self.encoder, base=self.base),
            facts=self._facts(),
        )

    def _facts(self) -> dict[str, Any]:
        """The account of rows and tokens, for the log: what was read is used, or dropped for a counted reason."""
        reports = {"training": self.train_tokens, "validation": self.validation_tokens}
        rows, tokens = (
            [report.summary() for report in self.data.reports],
            {name: each.counts() for name, each in reports.items()},
        )
        return {"rows": rows, "tokens": tokens}

    def _validation(self) -> Validation:
        generates_always = bool(self.problems) and self.config.evaluation.every == 1
        metrics = self.watched("accuracy" if generates_always else "loss")
        if "accuracy" in metrics and not self.problems:
            raise UserError(
                "training.metric accuracy: no validation row is a problem with an answer to check; expected rows with "
                "problem and answer, or the metric loss"
            )
        if self.metrics and not self.problems and not self.chats:
            raise UserError(
                "metrics: no validation row asks for an answer; expected problems or chats among the validation rows, "
                "and evaluation.problems or evaluation.samples above 0"
            )
        return self.validation_of(
            metrics, METRIC_DIRECTION, num_rows=len(self.validation_rows), digest=rows_digest(self.validation_rows)
        )

    def validate(self) -> dict[str, float]:
        """Loss on the validation rows and, every `evaluation.every` validations, generated answers: their metrics, and
        samples for the report.
        """
        loss = mean_loss(NextToken(self.model), self.validation_rows, device=self.device, world=self.world)
        if self.check is None or not self._generates_now():
            return {"loss": loss}
        world = self.world
        with self.trained.whole():
            metrics, records = self.check.validate(
                self.problems, self.chats, world.data_parallel, world.gather_data_parallel
            )
        if world.is_first:
            write_samples(self.fit.run_dir / "samples.jsonl", self.fit.position.step, records)
        answers = [record["answer"] if "answer" in record else record["response"] for record in records]
        references = [record["expected"] if "expected" in record else record["reference"] for record in records]
        return self.with_own_metrics({"loss": loss, **metrics}, answers, references)

    def _generates_now(self) -> bool:
        """Counted by the step, so that a resumed run generates at the same validations."""
        settings, position = self.config.training, self.fit.position
        every = settings.validate_every
        number = position.cursor.epoch if isinstance(every, str) else position.step // every
        return position.step >= self.fit.total_steps or number % self.config.evaluation.every == 0

    def improve(self, number: int, *, resume: bool) -> FitResult:
        """One round of self-improvement: chains sampled with the weights of the round before, the right ones kept, and
        the pretrained model trained anew on the demonstrations and these.
        """
        section = self.config.self_improvement
        assert section is not None
        folder = self._folder_of(number)
        folder.mkdir(parents=True, exist_ok=True)
        self.trained.take_best(self._folder_of(number - 1), self.config.training)
        problems = [example for example in self.data.train if isinstance(example, Demonstration)]
        if not problems:
            raise UserError(
                "self_improvement: no training row is a problem with an answer; expected problem and answer"
            )
        assert self.check is not None
        with explain_disk_full(folder, 1, "the chains found"), self.trained.whole():
            found = find_chains(
                folder,
                self.check,
                problems,
                section,
                number=number,
                shard=self.world.data_parallel,
                gather=self.world.gather_data_parallel,
                say=self.progress.say,
            )
        rows, report = self.encode([*self._worked(), *found.chains])
        self.progress.say(f"round {number} of {section.rounds}: {found.summary()}; tokens: {report.summary()}")
        seed_everything(self.config.training.seed)
        self.pretrained = self.load_pretrained(causal=True)
        self.build_model()
        return self.train_on(folder, rows, resume=resume)

    def _folder_of(self, number: int) -> Path:
        return self.run_dir / "rounds" / str(number) if number else self.run_dir

    def take_weights(self) -> None:
        """Loads the best weights of the best round, or the last."""
        settings, tracker, number = self.config.training, self.fit.tracker, len(self.results) - 1
        if tracker is not None and settings.keep_best:
            number = best_of([result.best_trained_metric for result in self.results], tracker.validation.mode)
        if number != len(self.results) - 1:
            self.pretrained = self.load_pretrained(causal=True)
            self.build_model()
        folder, of_round = self._folder_of(number), number if len(self.results) > 1 else None
        chosen = (self.trained, folder, settings, self.results[number], self.progress)
        take_chosen(*chosen, callbacks=self.callbacks, of_round=of_round, whole_run=self.run_dir)

    def exported(self) -> LanguageModel:
        return self.model

    def write_model(self) -> None:
        # The model writes its format wherever it is opened.
        self.tokenizer.chat_template = self.template.source
        base, causal = self.config.data.pretrained_weights, self.model.causal
        export_language_model(self.run_dir, causal, self.tokenizer, self.description(), lora=self.lora, base=base)

    def write_reports(self) -> None:
        for index in range(len(self.results)):
            write_report(self._folder_of(index))

    def description(self) -> dict[str, Any]:
        """What the model folder says of how reasoning is written."""
        return {
            "method": "chain_of_thought",
            "step_format": dataclasses.asdict(self.step_format),
            "stop_tokens": list(self.template.stop_tokens),
            "train_on": self.config.data.train_on,
            "max_length": self.max_length,
            **super().description(),
        }
