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
from loopos.data.supervised_tokens import OverLength, RowPolicy
from loopos.data.templates import ChatTemplate
from loopos.data.tokens import Encoded
from loopos.evaluation.comparison_judgment import ComparisonJudgment
from loopos.evaluation.outputs import NonFiniteOutputs
from loopos.evaluation.preference_report import measured
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
    return _finite(torch.stack([found[index] for index in range(len(rows))]))


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
        _finite(torch.cat(every))
    return found


def _finite(scores: Tensor) -> Tensor:
    """The raw scores `[N, k]`. Raises `NonFiniteOutputs`, because a mean or rank of non-finite scores has no
    meaning.
    """
    if bad := int((~scores.isfinite().all(-1)).sum()):
        raise NonFiniteOutputs(
            f"the reward model's scores of {bad} of {len(scores)} responses are not finite numbers; lower "
            "training.learning_rate if this is its training, use precision fp32 or other weights if it is trained"
        )
    return scores


@dataclass(frozen=True)
class Scored:
    """`rows`: for each row its `line` and the `scores` of its responses in order, with `spread`, the heads' standard
    deviation, if there are several heads; if each row has only one response, also `prompt` and `response`, with `score`
    instead of `scores`. `metrics`: those of `preference_metrics` if rows have preferences, else the number of responses
    and mean and standard deviation of the scores.
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
    response.
    """

    score: float
    spread: float | None
    tokens: int


class RewardPredictor:
    """Scores with one reward model."""

    def __init__(self, opened: OpenedReward, device: torch.device, *, ensemble_penalty: float = 0.0) -> None:
        self.opened, self.device, self.ensemble_penalty = opened, device, ensemble_penalty
        self.model = opened.model.requires_grad_(False).to(device).eval()
        self.template = ChatTemplate(opened.tokenizer)
        self.normalization = Normalization.read(opened.description)

    @classmethod
    def open(cls, source: str | ModelRef, *, device: str = "cpu", ensemble_penalty: float = 0.0) -> RewardPredictor:
        """source: the output folder of a reward_model run, or its model/ folder. Raises `UserError`."""
        return cls(open_reward_model(source), torch.device(device), ensemble_penalty=ensemble_penalty)

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
        `DataError`, also for rows without preferences.
        """
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

    def score(self, examples: Sequence[Comparison], *, on_bad_row: Literal["error", "skip"] = "error") -> Scored:
        """Scores of the responses of rows, in order; a row longer than the model's maximum length is an error."""
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
                response = example.responses[0]
                content = response if isinstance(response, str) else response[-1].content
                record |= {"prompt": text_of(example.prompt), "response": content, "score": rounded[0]}
            else:
                record["scores"] = rounded
            if spread is not None:
                record["spread"] = spread[0] if is_single else spread
            found.append(record)
        if any(example.pairs for example in examples):
            return Scored(found, measured(encoded, [[[score] for score in each] for each in scores]))
        flat = [score for each in scores for score in each]
        summary = {"responses": len(flat), "mean_score": statistics.fmean(flat), "std_score": statistics.pstdev(flat)}
        return Scored(found, summary)

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
