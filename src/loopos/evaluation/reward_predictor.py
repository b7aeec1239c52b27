"""Scores responses with a trained reward model, and measures its agreement with people.

Letters: N responses, P pairs, k heads.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.config.preferences import Aggregation
from loopos.data import rows
from loopos.data.batches import ComparisonRows, PackedRows, in_order, in_step
from loopos.data.conversations import ASSISTANT, Message
from loopos.data.decoding import PLAIN_RULES, TextRules
from loopos.data.preference_tokens import EncodedComparison, encode_comparisons
from loopos.data.preferences import Comparison, read_comparisons
from loopos.data.prompts import PromptContent
from loopos.data.prompts import prompt_text as text_of
from loopos.data.responses_to_score import read_responses
from loopos.data.rows import Row
from loopos.data.stepwise import Judgments, Stepwise
from loopos.data.stepwise_tokens import EncodedStepwise, StepwiseRows, encode_stepwise
from loopos.data.supervised_tokens import OverLength, RowPolicy
from loopos.data.templates import ChatTemplate
from loopos.data.tokens import Encoded
from loopos.evaluation.comparison_judgment import ComparisonJudgment
from loopos.evaluation.outputs import finite_scores
from loopos.evaluation.preference_metrics import preference_metrics
from loopos.evaluation.preference_report import measured
from loopos.evaluation.process_rewards import ChainText, probabilities, process_of, step_scores
from loopos.evaluation.step_metrics import step_metrics
from loopos.functional.packing import PackedLayout
from loopos.models.attention import prompt_runs_once
from loopos.models.backbone import Backbone
from loopos.models.folders import OpenedReward, open_reward_model
from loopos.models.resolve import ModelRef

Scorer = Callable[[Tensor, PackedLayout], Tensor]
"""ids `[T]`, layout → raw scores `[N, k]`."""

# Tokens of one forward pass.
_TOKENS = 2048


@dataclass(frozen=True)
class Normalization:
    """Raw scores → (raw − mean) / std of each head, `[k]`: reference responses have mean 0 and standard deviation 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, scores: Tensor) -> Normalization:
        """The normalization of raw scores `[N, k]`."""
        scores = scores.double()
        std = scores.std(0, correction=0).clamp_min(1e-8)
        return cls(tuple(scores.mean(0).tolist()), tuple(std.tolist()))

    @classmethod
    def none(cls, heads: int) -> Normalization:
        return cls((0.0,) * heads, (1.0,) * heads)

    @classmethod
    def read(cls, description: Mapping[str, Any]) -> Normalization:
        """The normalization in a model folder's description."""
        return cls(tuple(description["score_mean"]), tuple(description["score_std"]))

    def __call__(self, raw: Tensor, *, ensemble_penalty: float = 0.0) -> Tensor:
        """Raw scores `[N, k]` → scores `[N]` fp32: the heads' mean minus `ensemble_penalty` times their standard
        deviation (Coste et al. 2024, section 3: uncertainty-weighted optimization).
        """
        scores = (raw.float() - torch.tensor(self.mean, device=raw.device)) / torch.tensor(self.std, device=raw.device)
        mean = scores.mean(-1)
        if ensemble_penalty == 0.0 or scores.shape[-1] == 1:
            return mean
        return mean - ensemble_penalty * scores.std(-1, correction=0)


@torch.no_grad()
def raw_scores(model: Scorer, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Raw scores `[N, k]` on CPU of token rows (prompt and response), in order. Raises `NonFiniteOutputs`."""
    encoded = PackedRows([Encoded(list(ids), None, index) for index, ids in enumerate(rows)], None, device)
    found: dict[int, Tensor] = {}
    for batch in in_order(encoded, tokens=_TOKENS):
        found.update(zip(batch.rows, model(batch.ids, batch.layout).float().cpu(), strict=True))
    return finite_scores(torch.stack([found[index] for index in range(len(rows))]))


@torch.no_grad()
def comparison_scores(
    model: Scorer, rows: ComparisonRows, *, rank: int = 0, world: int = 1
) -> dict[int, list[list[float]]]:
    """Index of each comparison of this rank → raw scores of its responses, a list of k each. Raises
    `NonFiniteOutputs`.
    """
    found: dict[int, list[list[float]]] = {}
    every: list[Tensor] = []
    for batch, counts in in_step(rows, tokens=_TOKENS, rank=rank, world=world):
        scores, first = model(batch.ids, batch.layout).float().cpu(), 0
        for row in batch.rows if counts else ():
            count = len(rows.examples[row].responses)
            found[row] = scores[first : first + count].tolist()
            first += count
        if counts:
            every.append(scores)
    if every:
        finite_scores(torch.cat(every))
    return found


@dataclass(frozen=True)
class Scored:
    """What a file's responses were scored.

    `rows`: for each row its `line` and the `scores` of its responses in order, with `spread`, the heads' standard
    deviation, if there are several heads; if each row has only one response, also `prompt` and `response`, with `score`
    instead of `scores`. A process reward model adds `steps`, the probability of each step. `metrics`: those of
    `preference_metrics` if rows have preferences (of a process reward model only how often it agrees), those of
    `step_metrics` if steps have labels, else the number of responses and mean and standard deviation of the scores.
    """

    rows: list[dict[str, Any]]
    metrics: dict[str, float]


def judged_content(prompt: PromptContent, response: str, *, as_text: bool) -> tuple[PromptContent, PromptContent]:
    """Prompt and response as a reward model reads them. as_text: it was trained on plain texts, without a template."""
    if as_text and (isinstance(prompt, str) or len(prompt) == 1):
        return text_of(prompt), response
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return messages, (Message(ASSISTANT, response),)


@dataclass(frozen=True)
class Judged:
    """`score`: normalized. `spread`: the heads' standard deviation, None for a single one. `tokens`: of prompt and
    response. `steps`: the probability of each step, of a process reward model.
    """

    score: float
    spread: float | None
    tokens: int
    steps: tuple[float, ...] = ()


class RewardPredictor:
    """Scores with one reward model."""

    def __init__(
        self,
        opened: OpenedReward,
        device: torch.device,
        *,
        ensemble_penalty: float = 0.0,
        aggregation: Aggregation | None = None,
    ) -> None:
        """aggregation: of a process reward model, instead of its own. Raises `UserError` for another model."""
        self.opened, self.device, self.ensemble_penalty = opened, device, ensemble_penalty
        self.process = process_of(opened.description, aggregation)
        self.model = opened.model.requires_grad_(False).to(device).eval()
        self.template = ChatTemplate(opened.tokenizer)
        self.normalization = Normalization.read(opened.description)

    @classmethod
    def open(
        cls,
        source: str | ModelRef,
        *,
        device: str = "cpu",
        ensemble_penalty: float = 0.0,
        aggregation: Aggregation | None = None,
    ) -> RewardPredictor:
        """source: the output folder of a reward_model run, or its model/ folder. aggregation: how a process reward
        model makes one score of those of the steps, its own if None. Raises `UserError`.
        """
        opened = open_reward_model(source)
        return cls(opened, torch.device(device), ensemble_penalty=ensemble_penalty, aggregation=aggregation)

    def score_file(
        self,
        source: str,
        columns: Mapping[str, str],
        *,
        on_bad_row: Literal["error", "skip"] = "error",
        rules: TextRules = PLAIN_RULES,
    ) -> Scored:
        """Scores every response of a file: comparisons, prompts with one response or several, conversations. Raises
        `DataError`.
        """
        reader = rows.read(source, on_bad_row=on_bad_row, rules=rules)
        examples, _ = read_responses(reader, columns, as_text=bool(self.opened.description["text"]))
        return self.score(examples, on_bad_row=on_bad_row)

    def judge_comparisons(
        self,
        source: str,
        columns: Mapping[str, str],
        *,
        max_rows: int | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        rules: TextRules = PLAIN_RULES,
    ) -> ComparisonJudgment:
        """The comparisons of a file, measured. Rows over the model's maximum length are dropped and counted. Raises
        `DataError`, also for rows without preferences, and `UserError` for a process reward model.
        """
        if self.process is not None:
            raise UserError(f"{source}: a process reward model scores steps; use loopos score, which measures them too")
        reader = rows.read(source, max_rows=max_rows, on_bad_row=on_bad_row, rules=rules)
        examples, found = read_comparisons(reader, columns, as_text=bool(self.opened.description["text"]))
        encoded, tokens = encode_comparisons(
            self.opened.tokenizer,
            examples,
            template=self.template,
            max_length=self.opened.description["max_length"],
            policy=RowPolicy("drop", max_dropped_share=1.0, on_bad_row=on_bad_row),
        )
        raw = comparison_scores(self.model, self._rows(encoded))
        scores = [self._normalized(raw[position]) for position in range(len(encoded))]
        return ComparisonJudgment(examples, encoded, scores, "score", {**found.dropped, **tokens.dropped})

    def _normalized(self, raw: Sequence[Sequence[float]]) -> list[float]:
        scores: list[float] = self.normalization(torch.tensor(raw), ensemble_penalty=self.ensemble_penalty).tolist()
        return scores

    def score(self, examples: Sequence[Judgments], *, on_bad_row: Literal["error", "skip"] = "error") -> Scored:
        """Scores of the responses of rows, in order; a row longer than the model's maximum length is an error. Raises
        `UserError` for step labels if the model scores whole responses.
        """
        answers = [each for each in examples if isinstance(each, Stepwise)]
        compared = [each for each in examples if isinstance(each, Comparison)]
        if answers:
            return self._scored_steps(answers, on_bad_row)
        if self.process is not None:
            return self._scored_responses(compared, on_bad_row)
        return self._scored(compared, on_bad_row)

    def _scored_steps(self, answers: Sequence[Stepwise], on_bad_row: Literal["error", "skip"]) -> Scored:
        """Answers whose steps are given, and the metrics of their labels."""
        process = self.process
        if process is None:
            raise UserError(
                "these rows have step labels, but the model scores whole responses; expected a process reward model, "
                "which reward_model trains on such rows"
            )
        found = self.step_scores(answers, RowPolicy("error", on_bad_row=on_bad_row))
        lines = [
            {
                "line": answers[index].row.line,
                "score": _digits(process.score(scores)),
                "steps": [_digits(each) for each in probabilities(scores)],
            }
            for index, (_, scores) in found.items()
        ]
        scores = [each for _, each in found.values()]
        return Scored(lines, step_metrics(scores, [answers[index].labels for index in found]))

    def _scored_responses(self, examples: Sequence[Comparison], on_bad_row: Literal["error", "skip"]) -> Scored:
        """Responses as texts, which a process reward model splits into steps."""
        every = [(example, response) for example in examples for response in example.responses]
        conversations = [(example.prompt, response) for example, response in every]
        found = iter(self._judged_steps(conversations, RowPolicy("error", on_bad_row=on_bad_row)).items())
        is_single = all(len(example.responses) == 1 for example in examples)
        judged: dict[int, list[Judged]] = {}
        rows_of = [number for number, example in enumerate(examples) for _ in example.responses]
        for index, each in found:
            judged.setdefault(rows_of[index], []).append(each)
        lines = []
        for number, row in judged.items():
            example, scores = examples[number], [_digits(each.score) for each in row]
            steps = [[_digits(step) for step in each.steps] for each in row]
            line: dict[str, Any] = {"line": example.row.line}
            if is_single:
                line |= {"prompt": text_of(example.prompt), "response": _content(example.responses[0])}
            lines.append({**line, **({"score": scores[0]} if is_single else {"scores": scores}),
                          "steps": steps[0] if is_single else steps})  # fmt: skip
        flat = [each.score for row in judged.values() for each in row]
        pairs = [(row, pair) for number, row in judged.items() for pair in examples[number].pairs]
        if pairs:
            agreement = preference_metrics(
                [row[pair.better].score for row, pair in pairs],
                [row[pair.worse].score for row, pair in pairs],
                probabilities=[pair.probability for _, pair in pairs],
            )
            return Scored(lines, {name: agreement[name] for name in _AGREEMENT if name in agreement})
        return Scored(lines, _spread_of(flat))

    def step_scores(
        self, answers: Sequence[Stepwise], policy: RowPolicy
    ) -> dict[int, tuple[EncodedStepwise, list[float]]]:
        """Index of each answer that fits → its tokens and the score s of each step; σ(s) is the probability that the
        step is right. Of a process reward model only. Raises `DataError` by the policy.
        """
        assert self.process is not None, "asked of process reward models only"
        encoded, _ = encode_stepwise(
            self.opened.tokenizer,
            answers,
            separator=self.process.step_separator,
            template=self.template,
            max_length=self.opened.description["max_length"],
            policy=policy,
            needs_labels=False,
        )
        raw = step_scores(self.model, StepwiseRows(encoded, self.device))
        return {
            row.index: (row, self.normalization(torch.tensor(heads), ensemble_penalty=self.ensemble_penalty).tolist())
            for row, heads in ((row, raw[position]) for position, row in enumerate(encoded))
        }

    def _scored(self, examples: Sequence[Comparison], on_bad_row: Literal["error", "skip"]) -> Scored:
        """Whole responses."""
        encoded, _ = encode_comparisons(
            self.opened.tokenizer,
            examples,
            template=self.template,
            max_length=self.opened.description["max_length"],
            policy=RowPolicy("error", on_bad_row=on_bad_row),
        )
        raw = comparison_scores(self.model, self._rows(encoded))
        scores = [self._normalized(raw[position]) for position in range(len(encoded))]
        is_single = all(len(example.responses) == 1 for example in examples)
        found = []
        for row, each, heads in zip(encoded, scores, (raw[position] for position in range(len(encoded))), strict=True):
            example, rounded = examples[row.index], [round(score, 6) for score in each]
            record: dict[str, Any] = {"line": example.row.line}
            spread = [round(value, 6) for value in self._spread(heads)] if len(heads[0]) > 1 else None
            if is_single:
                content = _content(example.responses[0])
                record |= {"prompt": text_of(example.prompt), "response": content, "score": rounded[0]}
            else:
                record["scores"] = rounded
            if spread is not None:
                record["spread"] = spread[0] if is_single else spread
            found.append(record)
        if any(example.pairs for example in examples):
            return Scored(found, measured(encoded, [[[score] for score in each] for each in scores]))
        return Scored(found, _spread_of([score for each in scores for score in each]))

    def score_texts(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The score of each response after its prompt: (prompt, response) pairs. Raises as `judge`."""
        as_text = bool(self.opened.description["text"])
        judged = self.judge([judged_content(prompt, response, as_text=as_text) for prompt, response in pairs])
        return [each.score for each in judged]

    def rank(self, conversations: Sequence[tuple[PromptContent, str]]) -> list[float]:
        """The score of each response, a text, after its prompt; −∞ for those longer than the model's maximum length.
        Raises `UserError` if nothing fits.
        """
        as_text = bool(self.opened.description["text"])
        pairs = [judged_content(prompt, response, as_text=as_text) for prompt, response in conversations]
        return [-math.inf if found is None else found.score for found in self.judge_what_fits(pairs)]

    def rank_chains(self, chains: Sequence[ChainText]) -> list[float]:
        """The score of each chain, as `rank`; a process reward model scores the chain's own steps, also of a chain that
        is not at its end.
        """
        if self.process is None:
            return self.rank([(chain.prompt, chain.text) for chain in chains])
        as_text = bool(self.opened.description["text"])
        answers = [
            _stepwise(judged_content(chain.prompt, "", as_text=as_text)[0], self.process.steps_of_chain(chain), number)
            for number, chain in enumerate(chains)
        ]
        found = self.step_scores(answers, _FITTING)
        scores = [found[index][1] if index in found else None for index in range(len(chains))]
        return [-math.inf if each is None else self.process.score(each) for each in scores]

    def judge(self, conversations: Sequence[tuple[PromptContent, PromptContent]]) -> list[Judged]:
        """Judges each response after its prompt: both messages for the chat template, or both plain texts. Raises
        `UserError` for messages that the template refuses and for pairs longer than the model's maximum length.
        """
        return list(self._judged(conversations, "error").values())

    def judge_what_fits(self, conversations: Sequence[tuple[PromptContent, PromptContent]]) -> list[Judged | None]:
        """As `judge`, but None for pairs longer than the model's maximum length. Raises `UserError` if nothing fits."""
        found = self._judged(conversations, "drop")
        return [found.get(index) for index in range(len(conversations))]

    def _judged(
        self, conversations: Sequence[tuple[PromptContent, PromptContent]], over_length: OverLength
    ) -> dict[int, Judged]:
        """Index → judgment."""
        if self.process is not None:
            return self._judged_steps(conversations, RowPolicy(over_length, max_dropped_share=1.0))
        examples = [
            Comparison(prompt, (response,), (), Row({}, "responses", None, position))
            for position, (prompt, response) in enumerate(conversations)
        ]
        encoded, _ = encode_comparisons(
            self.opened.tokenizer,
            examples,
            template=self.template,
            max_length=self.opened.description["max_length"],
            policy=RowPolicy(over_length, max_dropped_share=1.0),
        )
        raw = comparison_scores(self.model, ComparisonRows(encoded, self.device))
        judged = {}
        for position, row in enumerate(encoded):
            heads = raw[position]
            score = self._normalized(heads)[0]
            spread = self._spread(heads)[0] if len(heads[0]) > 1 else None
            judged[row.index] = Judged(score, spread, row.num_tokens)
        return judged

    def _judged_steps(
        self, conversations: Sequence[tuple[PromptContent, PromptContent]], policy: RowPolicy
    ) -> dict[int, Judged]:
        """Index → judgment of the steps of a response. Raises `UserError` for a response of several turns."""
        process, answers = self.process, []
        assert process is not None, "asked of process reward models only"
        for number, (prompt, response) in enumerate(conversations):
            if not isinstance(response, str) and len(response) != 1:
                roles = ", ".join(message.role for message in response)
                raise UserError(f"a process reward model scores one answer in steps; got messages of {roles}")
            answers.append(_stepwise(prompt, process.steps_of(_content(response)), number))
        return {
            index: Judged(process.score(scores), None, len(row.ids), tuple(probabilities(scores)))
            for index, (row, scores) in self.step_scores(answers, policy).items()
        }

    def _spread(self, heads: Sequence[Sequence[float]]) -> list[float]:
        """Standard deviation over the heads of each response's normalized scores."""
        mean, std = torch.tensor(self.normalization.mean), torch.tensor(self.normalization.std)
        spread: list[float] = ((torch.tensor(heads) - mean) / std).std(-1, correction=0).tolist()
        return spread

    def _rows(self, encoded: list[EncodedComparison]) -> ComparisonRows:
        backbone = self.model.backbone
        runs_once = prompt_runs_once((each.num_tokens for each in encoded), on_cpu=self.device.type == "cpu")
        allowed = isinstance(backbone, Backbone) and backbone.supports_shared_prefixes
        return ComparisonRows(encoded, self.device, share_prompts=allowed and runs_once)


_FITTING = RowPolicy("drop", max_dropped_share=1.0)
_AGREEMENT = ("num_pairs", "pair_accuracy", "pair_accuracy_low", "pair_accuracy_high")
"""Metrics of preferences that read no gap of scores: a process reward model's are probabilities."""


def _stepwise(prompt: PromptContent, steps: Sequence[str], index: int) -> Stepwise:
    return Stepwise(prompt, tuple(steps), (None,) * len(steps), Row({}, "responses", None, index))


def _content(response: PromptContent) -> str:
    """The text of a response, or of its last message."""
    return response if isinstance(response, str) else response[-1].content


def _digits(probability: float) -> float:
    """Six significant digits."""
    return float(f"{probability:.6g}")


def _spread_of(scores: Sequence[float]) -> dict[str, float]:
    return {"responses": len(scores), "mean_score": statistics.fmean(scores), "std_score": statistics.pstdev(scores)}
