"""Chain-of-thought training: `sft` on problems with steps and an answer, validated by generated and checked answers.

    rows → chat template + step format → tokens with weights → next-token loss → update; validation generates and checks

Enters: a `ChainOfThoughtConfig`. Leaves: what `methods.sft` leaves, and `rounds/N/` for rounds of self-improvement.
After Wei et al. 2022; rounds of self-improvement after Zelikman et al. 2022 (STaR). Here is what reasoning adds: the
step format, answers to problems with their metrics, and the rounds. Model, tokens and loop are those of `sft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.diagnostics import UserError
from loopos.config.keys import Strategy
from loopos.data.batches import Batch
from loopos.data.demonstrations import Demonstration
from loopos.data.supervised_rows import Example
from loopos.data.tokens import Encoded
from loopos.evaluation.answer_check import AnswerCheck, SampleAnswers
from loopos.evaluation.found_chains import find_chains
from loopos.evaluation.reasoning import Ranker, Reasoner
from loopos.evaluation.report import write_report
from loopos.evaluation.reward_predictor import RewardPredictor
from loopos.methods.sft import Records, SftTrainer
from loopos.storage.durable import explain_disk_full
from loopos.training.fit import Fit
from loopos.training.identity import Identity, of_reasoning
from loopos.training.random_states import seed_everything
from loopos.training.run_state import FitResult
from loopos.training.trained_weights import take_chosen
from loopos.training.validation import best_of


class ChainOfThought(SftTrainer[ChainOfThoughtConfig]):
    """Teaches a language model to reason in steps: `ChainOfThought(config).train()`.

    One training, then `self_improvement.rounds` more, each in its own folder and from the pretrained weights.
    """

    def run_fit(self, *, resume: bool) -> FitResult:
        self.results = [self.train_on(self.run_dir, self.train_rows, resume=resume)]
        rounds = self.config.self_improvement.rounds if self.config.self_improvement is not None else 0
        while not self.results[-1].interrupted and len(self.results) <= rounds:
            self.results.append(self.improve(len(self.results), resume=resume))
        return self.results[-1]

    def train_on(self, folder: Path, rows: Sequence[Encoded], *, resume: bool) -> FitResult:
        """One training of the model on these rows, in its own folder."""
        self.folder, self.rows = folder, rows
        return super().run_fit(resume=resume)

    def load_data(self) -> None:
        super().load_data()
        problems = [example for example in self.data.validation if isinstance(example, Demonstration)]
        self.problems = problems[: self.config.evaluation.problems] if self.config.generates else []
        if self.problems:
            self.progress.say(f"validation generates answers to {len(self.problems)} problems")

    def learned(self) -> list[Example]:
        """The training rows to learn from. Under self-improvement, problems without steps are left out: chains are
        sampled for them, and learning them as they are would teach the model to answer without reasoning.
        """
        worked = [e for e in self.data.train if not isinstance(e, Demonstration) or e.steps]
        return worked if self.config.self_improvement is not None and worked else self.data.train

    def generates(self) -> bool:
        return bool(self.problems or self.chats) or self.config.self_improvement is not None

    def answers_of(self, reasoner: Reasoner) -> AnswerCheck:
        config = self.config
        ranker = self._ranker()
        return AnswerCheck(reasoner, config.generation, config.evaluation, seed=config.training.seed, ranker=ranker)

    def _ranker(self) -> Ranker | None:
        """What ranks the chains of validation; None: the model's own logprobs. Raises `UserError` for a reward model
        that cannot score unfinished chains where the strategy needs it.
        """
        generation = self.config.generation
        if generation.reward_model is None or not self.problems:
            return None
        predictor = RewardPredictor.open(generation.reward_model, device=str(self.device))
        if predictor.process is None and Strategy.parse(generation.strategy).kind == "step_beam":
            raise UserError(
                f"generation.reward_model: {generation.reward_model} scores whole responses, but step_beam ranks "
                "unfinished chains; expected a process reward model, trained on rows with step labels"
            )
        return predictor.rank_chains

    def build_fit(self) -> Fit[Batch]:
        return self.fit_on(self.folder, self.rows)

    def identity_of(self, rows: Sequence[Encoded]) -> Identity:
        return of_reasoning(self.config, rows, self.encoder, base=self.base)

    def default_metric(self) -> str:
        generates_always = bool(self.problems) and self.config.evaluation.every == 1
        return "accuracy" if generates_always else "loss"

    def check_metrics(self, names: tuple[str, str]) -> None:
        if "accuracy" in names and not self.problems:
            raise UserError(
                "training.metric accuracy: no validation row is a problem with an answer to check; expected rows with "
                "problem and answer, or the metric loss"
            )
        if self.metrics and not self.problems and not self.chats:
            raise UserError(
                "metrics: no validation row asks for an answer; expected problems or chats among the validation rows, "
                "and evaluation.problems or evaluation.samples above 0"
            )

    def generated(self, answers: SampleAnswers) -> tuple[dict[str, float], Records]:
        assert isinstance(answers, AnswerCheck), "made by answers_of"
        world = self.world
        return answers.validate(self.problems, self.chats, world.data_parallel, world.gather_data_parallel)

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
        assert isinstance(self.answers, AnswerCheck), "made by answers_of"
        with explain_disk_full(folder, 1, "the chains found"), self.trained.whole():
            found = find_chains(
                folder,
                self.answers,
                problems,
                section,
                number=number,
                shard=self.world.data_parallel,
                gather=self.world.gather_data_parallel,
                say=self.progress.say,
            )
        rows, report = self.encode([*self.learned(), *found.chains])
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

    def write_reports(self) -> None:
        for index in range(len(self.results)):
            write_report(self._folder_of(index))
