"""Problems → chains of reasoning → answers, by a language model and a strategy.

The code that encodes training prompts encodes these prompts too. Answers are checked in `answer_check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.config.keys import RANKED, Strategy
from loopos.data.conversations import Conversation, Message, Question
from loopos.data.demonstrations import Demonstration
from loopos.data.prompts import PromptContent
from loopos.data.step_format import NAMED_FORMATS, StepFormat
from loopos.data.supervised_rows import Completion as RawText
from loopos.data.supervised_rows import PlainText
from loopos.data.supervised_tokens import Problem, prompt_messages, prompt_tokens
from loopos.data.templates import ChatTemplate, TemplateRefusal
from loopos.evaluation.checkers import Sample, majority
from loopos.evaluation.process_rewards import ChainText
from loopos.generation.engine import Engine
from loopos.generation.search import best_of_n, mean_logprobs, step_beam_search
from loopos.generation.settings import SamplingParams
from loopos.generation.steps import Chain, StepLimits, reason
from loopos.models.folders import open_generation_model
from loopos.models.language_ensemble import LanguageEnsemble
from loopos.models.resolve import ModelRef, resolve_trained

Ranker: TypeAlias = Callable[[Sequence[ChainText]], list[float]]
"""Chains → a score each; higher is better."""


@dataclass(frozen=True)
class Answered:
    """The answer to one problem. `chains`: all sampled chains; `chosen`: the index of the one whose answer counts, None
    if none has an answer; `confidence`: its fraction of the votes (`is_voted`), or its mean logprob; None for a single
    chain. `rewards`: scores of a reward model, if one ranked the chains.
    """

    chains: tuple[Chain, ...]
    chosen: int | None
    answer: str
    confidence: float | None = None
    is_voted: bool = False
    rewards: tuple[float, ...] = ()

    def samples(self) -> list[Sample]:
        """The chains as `answer_metrics` takes them."""
        return [Sample(c.text, len(c.token_ids), c.finish_reason == "stop") for c in self.chains]


class Reasoner:
    """Answers problems in steps, and chats: `loopos.load("outputs/run").answer(["What is 17 + 26?"])`."""

    def __init__(
        self,
        model: PreTrainedModel | LanguageEnsemble,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: ChatTemplate,
        step_format: StepFormat,
        max_rows: int = 64,
        voters: Sequence[Reasoner] = (),
    ) -> None:
        """The model is used as it is, also while it trains: no copy is made. voters: other models whose answers to
        `answer` have equal votes.
        """
        self.voters = tuple(voters)
        self.model, self.tokenizer, self.template, self.step_format = model, tokenizer, template, step_format
        self.engine = Engine(model, tokenizer, max_rows=max_rows)

    @classmethod
    def open(
        cls,
        source: str | ModelRef,
        *,
        device: str = "cpu",
        precision: str | None = None,
        step_format: StepFormat | None = None,
        chat_template: str = "auto",
        max_rows: int = 64,
        trust_remote_code: bool = False,
    ) -> Reasoner:
        """source: the output folder of a run, a value of `data.pretrained_weights`, or the folder of an ensemble.
        precision: fp32, bf16 or fp16; default: that of the training, bf16 for quantized models and fp32 for others.
        step_format: default: that of the training, "think" for other models. Raises `UserError`.
        """
        ref = resolve_trained(source)
        members: Sequence[str | ModelRef] = (
            ref.ensemble.members if ref.ensemble is not None and ref.ensemble.votes else (ref,)
        )
        voters: list[Reasoner] = []
        # The first is opened last, and gets the others as voters.
        for each in reversed(members):
            opened = open_generation_model(
                each, device=device, precision=precision, trust_remote_code=trust_remote_code
            )
            reasoner = cls(
                opened.model,
                opened.tokenizer,
                template=ChatTemplate(opened.tokenizer, chat_template),
                step_format=step_format or format_of(opened.description),
                max_rows=max_rows,
                voters=voters if each is members[0] else (),
            )
            if voters and voters[0].step_format != reasoner.step_format:
                raise UserError(
                    f"{ref.name}: its members use different step formats ({voters[0].step_format} and "
                    f"{reasoner.step_format}); expected members with one step format, so that their answers can be "
                    "compared"
                )
            voters.insert(0, reasoner)
        return reasoner

    def prompt(self, problem: Problem) -> list[int]:
        """The prompt tokens. Raises `UserError` if the chat template refuses the messages."""
        try:
            return prompt_tokens(self.tokenizer, problem, template=self.template)
        except TemplateRefusal as refusal:
            raise UserError(f"{refusal}; {refusal.hint}" if refusal.hint else str(refusal)) from refusal

    def sampling(self, settings: SamplingParams) -> SamplingParams:
        """The settings with the stop tokens of this model's template."""
        return replace(settings, stop_token_ids=(*settings.stop_token_ids, *self.template.stop_tokens))

    def answer(
        self,
        problems: Sequence[Problem],
        settings: SamplingParams = SamplingParams(),
        *,
        strategy: Strategy = Strategy(),
        limits: StepLimits = StepLimits(),
        ranker: Ranker | None = None,
    ) -> list[Answered]:
        """An answer to every problem, in order. With voters: the most frequent answer of all chains, or of all best
        chains for a strategy that chooses one. ranker: ranks for `best_of_n`, and for `step_beam`, whose chains it gets
        unfinished, instead of the chains' mean logprob. Raises `UserError` for prompts that the model cannot take, and
        for several chains at temperature 0.
        """
        _require_list("problems", problems)
        assert ranker is None or strategy.kind in RANKED, "a ranker ranks the chains of best_of_n and step_beam"
        found = self._answer(problems, settings, strategy, limits, ranker)
        others = [each._answer(problems, settings, strategy, limits, ranker) for each in self.voters]
        if not others:
            return found
        speakers = (self, *self.voters)
        return [_together(speakers, each) for each in zip(found, *others, strict=True)]

    def generate(
        self, prompts: Sequence[Problem], settings: SamplingParams = SamplingParams(), *, n: int = 1
    ) -> list[str]:
        """n texts for every prompt, in order: all of the first prompt, then all of the second. A prompt is a user
        message or a list of messages; a `loopos.data.supervised_rows.Completion` is continued without a template.
        Raises `UserError` for prompts that the model cannot take, and for an ensemble that votes.
        """
        _require_list("prompts", prompts)
        self._refuse_voters()
        tokens = [self.prompt(prompt) for prompt in prompts]
        return [each.text for each in self.engine.generate(tokens, self.sampling(settings), n=n, logprobs=False)]

    def chat(self, messages: str | Sequence[Mapping[str, object]], settings: SamplingParams = SamplingParams()) -> str:
        """The reply to a user message, or to messages {"role", "content"}. Raises as `generate`."""
        return self.generate([messages_of(messages)], settings)[0]

    def stream(
        self, messages: str | Sequence[Mapping[str, object]], settings: SamplingParams = SamplingParams()
    ) -> Iterator[str]:
        """Streams the reply; the deltas together are the text of `chat`."""
        self._refuse_voters()
        tokens = self.prompt(messages_of(messages))
        return (delta.text for delta in self.engine.stream([tokens], self.sampling(settings)))

    def _refuse_voters(self) -> None:
        if self.voters:
            raise UserError("an ensemble that votes over answers has no distribution over tokens; use answer()")

    def has_room(self, problem: Problem) -> bool:
        """Whether the problem leaves every model a position for an answer."""
        return all(
            each.engine.max_positions is None or len(each.prompt(problem)) < each.engine.max_positions
            for each in (self, *self.voters)
        )

    def _answer(
        self,
        problems: Sequence[Problem],
        settings: SamplingParams,
        strategy: Strategy,
        limits: StepLimits,
        ranker: Ranker | None,
    ) -> list[Answered]:
        """Answers by this model only."""
        prompts = [self.prompt(problem) for problem in problems]
        sampling, marks = self.sampling(settings), self.step_format
        contents = [] if ranker is None else [_content(problem) for problem in problems]
        if strategy.kind == "step_beam":
            found = step_beam_search(
                self.engine, prompts, marks, sampling, beams=strategy.beams, candidates=strategy.candidates,
                scores=mean_logprobs if ranker is None else partial(self._scores, contents, ranker),
                limits=limits if limits.max_steps is not None else replace(limits, max_steps=32),
            )  # fmt: skip
            return [self._best(chains) for chains in found] if ranker is None else self._ranked(contents, found, ranker)
        if ranker is not None:
            sampled = self.sample(prompts, settings, n=strategy.chains, limits=limits)
            return self._ranked(contents, [found.chains for found in sampled], ranker)
        if strategy.kind == "best_of_n":
            ranked = best_of_n(self.engine, prompts, marks, sampling, n=strategy.chains, limits=limits)
            return [self._best(chains) for chains in ranked]
        return self.sample(prompts, settings, n=strategy.chains, limits=limits)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingParams,
        *,
        n: int,
        limits: StepLimits = StepLimits(),
    ) -> list[Answered]:
        """n chains for every prompt, with their most frequent answer. Raises `UserError` as `answer` does."""
        if n > 1 and settings.greedy:
            raise UserError(f"{n} chains at temperature 0 would be equal: use a temperature above 0")
        sampled = reason(self.engine, prompts, self.step_format, self.sampling(settings), limits=limits, n=n)
        return [self._voted(chains) for chains in sampled]

    def _scores(self, contents: Sequence[PromptContent], ranker: Ranker, chains: Sequence[Chain]) -> list[float]:
        """The rewards of chains, finished or not. contents: of the prompts, by their index."""
        return ranker([self._chain_text(contents[chain.prompt_index], chain) for chain in chains]) if chains else []

    def _chain_text(self, content: PromptContent, chain: Chain) -> ChainText:
        """The chain split as the step format writes it; of an unfinished one all text is steps."""
        if not chain.well_formed:
            return ChainText(content, chain.text, tuple(step.text for step in chain.steps), "")
        parsed = self.step_format.parse(chain.text)
        answer = self.step_format.answer_marker + parsed.answer if parsed.answer else ""
        return ChainText(content, chain.text, parsed.steps, answer)

    def _ranked(
        self, contents: Sequence[PromptContent], sampled: Sequence[Sequence[Chain]], ranker: Ranker
    ) -> list[Answered]:
        """The chains of each problem in the order of their rewards; the first gives the answer."""
        rewards = iter(self._scores(contents, ranker, [chain for chains in sampled for chain in chains]))
        found = []
        for chains in sampled:
            scored = sorted(((next(rewards), -index, chain) for index, chain in enumerate(chains)), reverse=True)
            best = scored[0][2]
            answer = self.step_format.parse(best.text).answer
            ranked = tuple(chain for _, _, chain in scored)
            found.append(Answered(ranked, 0, answer, rewards=tuple(reward for reward, _, _ in scored)))
        return found

    def _best(self, chains: Sequence[Chain]) -> Answered:
        """The answer of chains that are sorted best first."""
        chosen = chains[0]
        summary = len(chosen.token_ids) - len(chosen.forced)
        mean = sum(chosen.logprobs) / summary if summary else None
        return Answered(tuple(chains), 0, self.step_format.parse(chosen.text).answer, mean)

    def _voted(self, chains: Sequence[Chain]) -> Answered:
        answers = [self.step_format.parse(chain.text).answer for chain in chains]
        if len(chains) == 1:
            return Answered(tuple(chains), 0 if answers[0] else None, answers[0])
        return _of_most(chains, answers)


def _require_list(name: str, actual: Sequence[Problem]) -> None:
    """Raises `UserError` for a text alone, whose characters would be prompts of their own."""
    if isinstance(actual, str):
        raise UserError(f"{name}: got the text {actual!r:.60}; expected a list, such as [{actual!r:.60}]")


def messages_of(actual: str | Sequence[Mapping[str, object]]) -> str | list[Message]:
    """A user message as it is, or messages from dicts. Raises `UserError` for one without role or content."""
    if isinstance(actual, str):
        return actual
    messages = []
    for number, message in enumerate(actual):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f'message {number}: got {dict(message)!r:.80}; expected a dict with "role" and "content"')
        more = {key: value for key, value in message.items() if key not in ("role", "content")}
        messages.append(Message(role, content, more=more))
    return messages


def _content(problem: Problem) -> PromptContent:
    """The prompt as a reward model reads it."""
    match problem:
        case str():
            return (Message("user", problem),)
        case RawText(prompt=text):
            return text
        case Demonstration():
            return tuple(prompt_messages(problem))
        case Question():
            if problem.tools:
                raise UserError("a reward model cannot rank answers to prompts with tools; remove --reward-model")
            return problem.messages
        case Conversation() | PlainText():
            raise UserError("a reward model ranks answers to prompts, but these rows are whole conversations or texts")
        case _:
            return tuple(problem)


def _together(speakers: Sequence[Reasoner], found: Sequence[Answered]) -> Answered:
    """The combined answer of several models to one problem: every chain has a vote, or only the best one if a strategy
    chose it by logprob.
    """
    chains: list[Chain] = []
    answers: list[str] = []
    for speaker, answered in zip(speakers, found, strict=True):
        chosen = answered.chains
        if answered.chosen is not None and not answered.is_voted:
            chosen = (answered.chains[answered.chosen],)
        chains += chosen
        answers += [speaker.step_format.parse(chain.text).answer for chain in chosen]
    return _of_most(chains, answers)


def _of_most(chains: Sequence[Chain], answers: Sequence[str]) -> Answered:
    """The most frequent answer of the chains."""
    winner = majority(answers)
    if winner is None:
        return Answered(tuple(chains), None, "", 0.0, is_voted=True)
    return Answered(tuple(chains), winner[0], answers[winner[0]], winner[1], is_voted=True)


def format_of(description: Mapping[str, Any]) -> StepFormat:
    """The step format of a model folder's description; "think" if it names none."""
    marks = description.get("step_format")
    return NAMED_FORMATS["think"] if marks is None else StepFormat(**marks)
