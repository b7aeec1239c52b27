"""Chain-of-thought training: problem → steps → answer, learned from demonstrations, checked by generating.

    rows → chat template + step format → tokens with weights → next-token loss → update; validation generates and checks

Enters: a `ChainOfThoughtConfig`. Leaves: a run folder with checkpoints, events, samples.jsonl, a report and the trained
language model. After Wei et al. 2022; rounds of self-improvement after Zelikman et al. 2022 (STaR). Left out: the loop
(`training.fit`), the reading of data (`data.supervised`), generation itself.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.diagnostics import UserError
from loopos.config.differences import as_begun
from loopos.config.sections import LoraSection
from loopos.data.batches import Batch, PackedRows, StepBatches
from loopos.data.demonstrations import Demonstration
from loopos.data.digest import rows_digest
from loopos.data.reading import account
from loopos.data.supervised import load_supervised
from loopos.data.supervised_rows import Example
from loopos.data.supervised_tokens import SupervisedEncoder, SupervisedReport
from loopos.data.tokens import Encoded, longest
from loopos.evaluation.answer_check import AnswerCheck, chats_of
from loopos.evaluation.found_chains import find_chains
from loopos.evaluation.metrics import METRIC_DIRECTION
from loopos.evaluation.own_metrics import OwnMetrics
from loopos.evaluation.reasoning import Reasoner
from loopos.evaluation.report import write_report
from loopos.evaluation.run_claim import claim
from loopos.models.adapters import set_trained_language_model
from loopos.models.folders import export_language_model
from loopos.models.language_model import LanguageModel
from loopos.models.load import Pretrained, Sizes, load_pretrained
from loopos.storage.durable import explain_disk_full
from loopos.training.callbacks import CALLBACK, Callbacks, kept_random_states
from loopos.training.distributed import World
from loopos.training.fit import Fit
from loopos.training.identity import of_reasoning
from loopos.training.objectives import NextToken, mean_loss, with_router_loss
from loopos.training.precision import resolve
from loopos.training.progress import RunProgress, write_samples
from loopos.training.random_states import seed_everything
from loopos.training.run_state import FitResult
from loopos.training.session import session
from loopos.training.trained_weights import TrainedWeights, take_chosen
from loopos.training.update import build_update
from loopos.training.validation import Validation, best_of


@dataclass(eq=False)
class ChainOfThought:
    """Teaches a language model to reason in steps: `ChainOfThought(config).train()`.

    `environment`: settings of the process, by name, for the log. `callbacks`, `metrics`: the user's own functions.
    """

    config: ChainOfThoughtConfig
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
        """Data, model, fit, rounds of self-improvement, export, report. Raises `UserError` for a mistake of the user's;
        nothing of an earlier run is overwritten without `resume`.
        """
        with (
            session(self.config.training, self.config.distributed) as (self.device, self.world),
            claim(self.run_dir, self.world, resume=resume, note=self.progress.warn),
        ):
            self.config = as_begun(self.config, self.run_dir)
            self.build_model(self.load_data())
            results = [self.fit(self.run_dir, self.train_rows, resume=resume)]
            rounds = self.config.self_improvement.rounds if self.config.self_improvement is not None else 0
            while not self._is_over(results[-1]) and len(results) <= rounds:
                results.append(self.improve(len(results), resume=resume))
            if not results[-1].interrupted:
                self.export(results)
            self.world.wait()
        return results[-1]

    def _is_over(self, result: FitResult) -> bool:
        """Whether no round follows: a signal or a callback has ended the run."""
        return result.interrupted or result.stopped_by == CALLBACK

    def load_data(self) -> Pretrained:
        """Reads the rows, loads the model, and tokenises by its template; says what was decided."""
        config, settings, data = self.config, self.config.training, self.config.data
        self.data = load_supervised(data, seed=settings.seed)
        self.step_format = self.data.step_format
        pretrained = self._load_pretrained()
        self.tokenizer = pretrained.tokenizer
        positions = getattr(pretrained.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = longest(self.tokenizer, positions, settings.max_length)
        self.encoder = SupervisedEncoder(data, self.step_format, self.tokenizer, max_length=self.max_length)
        self.template = self.encoder.template
        self.train_rows, self.train_tokens = self.encode(self._worked())
        self.validation_rows: list[Encoded] = []
        self.validation_tokens = SupervisedReport()
        if config.validates and self.data.validation:
            self.validation_rows, self.validation_tokens = self.encode(self.data.validation)
        problems = [example for example in self.data.validation if isinstance(example, Demonstration)]
        self.problems = problems[: config.evaluation.problems] if config.generates else []
        self.chats = chats_of(self.data.validation)[: config.evaluation.samples] if config.validates else []
        tokens = f"tokens: {self.train_tokens.summary()}"
        self.progress.say(pretrained.summary, *self.data.summary, self.template.summary, tokens)
        if self.problems:
            self.progress.say(f"validation generates answers to {len(self.problems)} problems")
        return pretrained

    def _worked(self) -> list[Example]:
        """The training rows that show how. Under self-improvement, problems whose steps are not told are there for
        chains to be found: learned as they stand, they would teach to answer without reasoning.
        """
        worked = [e for e in self.data.train if not isinstance(e, Demonstration) or e.steps]
        return worked if self.config.self_improvement is not None and worked else self.data.train

    def _load_pretrained(self) -> Pretrained:
        data = self.config.data
        return load_pretrained(
            data.pretrained_weights,
            causal=True,
            sizes=Sizes.of(self.config.model, max_length=self.config.training.max_length),
            tokenizer=data.tokenizer,
            trust_remote_code=self.trust_remote_code,
        )

    def encode(self, examples: Sequence[Example]) -> tuple[list[Encoded], SupervisedReport]:
        """Tokens and weights of examples, by the config's rules. Raises `DataError`."""
        rows, report = self.encoder(examples)
        return [row.encoded() for row in rows], report

    def build_model(self, pretrained: Pretrained) -> LanguageModel:
        """The language model, what trains, the number format, and the reasoner that generates with the same weights."""
        settings = self.config.training
        self.precision = resolve(settings.precision, self.device)
        self.base = pretrained.fingerprint
        self.model = LanguageModel(pretrained.model, attention=self.config.model.attention)
        backbone = self.model.backbone
        self.progress.say(f"attention: {backbone.path}" + (f" ({backbone.reason})" if backbone.reason else ""))
        held_back = set_trained_language_model(self.model.causal, backbone.model, settings)
        if settings.gradient_checkpointing:
            self.model.causal.activation_checkpointing_enable()
        self.trained = TrainedWeights(
            self.model, settings, precision=self.precision, device=self.device, world=self.world, held_back=held_back
        )
        self.progress.say(self.trained.summary())
        self.check: AnswerCheck | None = None
        if self.problems or self.chats or self.config.self_improvement is not None:
            causal = self.model.causal
            with self.trained.whole():
                reasoner = Reasoner(causal, self.tokenizer, template=self.template, step_format=self.step_format)
            self.check = AnswerCheck(reasoner, self.config.generation, self.config.evaluation, seed=settings.seed)
            self.progress.say(reasoner.engine.summary)
        return self.model

    def fit(self, folder: Path, rows: Sequence[Encoded], *, resume: bool) -> FitResult:
        """One training of the model on these rows, in its own folder."""
        self.build_fit(folder, rows).open(resume=resume)
        return self.current.run()

    def build_fit(self, folder: Path, rows: Sequence[Encoded]) -> Fit[Batch]:
        """Optimizer, update, batches and loop."""
        settings, world, (share, shares) = self.config.training, self.world, self.world.share
        self.current = Fit(
            run_dir=folder,
            config=self.config,
            settings=settings,
            update=build_update(self.model, self.trained.master_weights, settings, self.precision, world, head=()),
            batches=StepBatches.of(settings, PackedRows(rows, None, self.device), rank=share, world=shares),
            objective=with_router_loss(NextToken(self.model), self.model.backbone, settings.router_aux_loss),
            validation=self._validation() if self.validation_rows else None,
            progress=self.progress,
            callbacks=self.callbacks,
            world=world,
            identity=of_reasoning(self.config, rows, self.encoder, base=self.base),
            facts=self._facts(),
            unfreeze=self.trained.unfreeze if self.trained.later else None,
        )
        return self.current

    def _facts(self) -> dict[str, Any]:
        """The account of rows and tokens, for the log: what was read is used, or dropped for a counted reason."""
        reports = {"training": self.train_tokens, "validation": self.validation_tokens}
        rows, tokens = list(map(account, self.data.reports)), {name: each.counts() for name, each in reports.items()}
        return {"rows": rows, "tokens": tokens, "precision": self.precision, "environment": self.environment}

    def _validation(self) -> Validation:
        settings = self.config.training
        checked = bool(self.problems) and self.config.evaluation.every == 1
        metric = settings.metric or ("accuracy" if checked else "loss")
        early = settings.early_stopping
        watched = (early.metric if early is not None else None) or metric
        if "accuracy" in (metric, watched) and not self.problems:
            raise UserError(
                "training.metric accuracy: no validation row is a problem with an answer to check; expected rows with "
                "problem and answer, or the metric loss"
            )
        if self.metrics and not self.problems and not self.chats:
            raise UserError(
                "metrics: no validation row asks for an answer; expected problems or chats among the validation rows, "
                "and evaluation.problems or evaluation.samples above 0"
            )
        directions = [self.metrics.direction(name, METRIC_DIRECTION) for name in (metric, watched)]
        num_rows, rows, own = len(self.validation_rows), rows_digest(self.validation_rows), self.metrics.directions
        return Validation(self.validate, metric, directions[0], watched, directions[1], num_rows, rows, own)

    def validate(self) -> dict[str, float]:
        """Loss on the validation rows and, every `evaluation.every` validations, generated answers: their metrics, and
        samples for the report.
        """
        loss = mean_loss(NextToken(self.model), self.validation_rows, device=self.device, world=self.world)
        if self.check is None or not self._generates_now():
            return {"loss": loss}
        world = self.world
        with self.trained.whole():
            metrics, records = self.check.validate(self.problems, self.chats, world.share, world.gather_shares)
        if world.is_first:
            write_samples(self.current.run_dir / "samples.jsonl", self.current.position.step, records)
        answers = [record["answer"] if "answer" in record else record["response"] for record in records]
        references = [record["expected"] if "expected" in record else record["reference"] for record in records]
        metrics = {"loss": loss, **metrics}
        with kept_random_states():
            return self.metrics.added(metrics, answers, references, is_first=world.is_first, gather=world.gather)

    def _generates_now(self) -> bool:
        """Counted by the step, so that a resumed run generates at the same validations."""
        settings, position = self.config.training, self.current.position
        every = settings.validate_every
        number = position.cursor.epoch if isinstance(every, str) else position.step // every
        return position.step >= self.current.total_steps or number % self.config.evaluation.every == 0

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
                shard=self.world.share,
                gather=self.world.gather_shares,
                say=self.progress.say,
            )
        rows, report = self.encode([*self._worked(), *found.chains])
        self.progress.say(f"round {number} of {section.rounds}: {found.summary()}; tokens: {report.summary()}")
        seed_everything(self.config.training.seed)
        self.build_model(self._load_pretrained())
        return self.fit(folder, rows, resume=resume)

    def _folder_of(self, number: int) -> Path:
        return self.run_dir / "rounds" / str(number) if number else self.run_dir

    def export(self, results: Sequence[FitResult]) -> None:
        """Takes the best weights of the best round, or the last, and writes the model folder and the reports.

        Raises `DiskFull`; the run's checkpoints are whole then.
        """
        settings, judges, number = self.config.training, self.current.judges, len(results) - 1
        if judges is not None and settings.keep_best:
            number = best_of([result.best_trained_metric for result in results], judges.validation.mode)
        if number != len(results) - 1:
            self.build_model(self._load_pretrained())
        folder, which = self._folder_of(number), number if len(results) > 1 else None
        take = (self.trained, folder, settings, results[number], self.world, self.progress)
        take_chosen(*take, callbacks=self.callbacks, of_round=which, whole_run=self.run_dir)
        if not self.trained.gather():
            return
        needed_bytes = 4 * sum(parameter.numel() for parameter in self.model.parameters())
        with explain_disk_full(self.run_dir, needed_bytes, "the trained model"):
            # The model speaks its format wherever it is opened.
            self.tokenizer.chat_template = self.template.source
            lora = settings.lora or LoraSection() if settings.trainable == "lora" else None
            base, causal = self.config.data.pretrained_weights, self.model.causal
            export_language_model(self.run_dir, causal, self.tokenizer, self.description(), lora=lora, base=base)
            for index in range(len(results)):
                write_report(self._folder_of(index))
        self.progress.say(f"model: {self.run_dir / 'model'} · report: {self.run_dir / 'report.md'}")

    def description(self) -> dict[str, Any]:
        """What the model folder says of how reasoning is written."""
        return {
            "method": "chain_of_thought",
            "step_format": dataclasses.asdict(self.step_format),
            "stop_tokens": list(self.template.stop_tokens),
            "train_on": self.config.data.train_on,
            "max_length": self.max_length,
            "precision": "bf16" if self.precision == "bf16" else "fp32",
            "pretrained_weights": os.path.basename(self.config.data.pretrained_weights.rstrip("/")),
        }
