"""Scored responses → rows of training data: the best ones, pairs, groups, or all.

A chosen response ended by itself and has a text; a response that was cut at the token limit would teach to stop in the
middle of a sentence. Rows of a chat have messages, rows of a text to continue have texts.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from loopos.data.conversations import ASSISTANT
from loopos.data.prompts import PromptContent
from loopos.data.record import text_problem
from loopos.data.stored_logprobs import COLUMN
from loopos.data.tool_schemas import Tool
from loopos.evaluation.checkers import Sample
from loopos.evaluation.sample_metrics import normalized

PairRule: TypeAlias = Literal["best-worst", "random", "all"]
PAIR_RULES: tuple[PairRule, ...] = ("best-worst", "random", "all")


@dataclass(frozen=True, slots=True)
class JudgedPrompt:
    """One prompt with its responses. `number`: of the prompt. `columns`: those of its row that are kept beside the
    responses. `scores`: None for a response that was not judged.
    """

    number: int
    prompt: PromptContent
    samples: tuple[Sample, ...]
    scores: tuple[float | None, ...]
    tools: tuple[Tool, ...] = ()
    columns: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRule:
    """`threshold`: score from which a response passes and may be chosen; None: any. `min_margin`: least difference of
    the scores of a pair. `pairs`: which pairs of a prompt. `top`: most responses of a prompt that `best` keeps.
    `allow_cut`: also responses that the token limit ended may be chosen. `seed`: of random pairs.
    """

    threshold: float | None = None
    min_margin: float = 0.0
    pairs: PairRule = "best-worst"
    top: int = 1
    allow_cut: bool = False
    seed: int = 0

    def may_choose(self, judged: JudgedPrompt, index: int) -> bool:
        """Whether this response may be learned."""
        score = judged.scores[index]
        is_whole = self.allow_cut or judged.samples[index].ended
        return score is not None and is_whole and (self.threshold is None or score >= self.threshold)


@dataclass(frozen=True, slots=True)
class Selection:
    """`rows` of one prompt; `chosen` and `rejected`: which responses they learn, and learn against, once per use."""

    rows: list[dict[str, Any]]
    chosen: tuple[int, ...] = ()
    rejected: tuple[int, ...] = ()


def best(judged: JudgedPrompt, rule: SelectionRule) -> Selection:
    """The responses of the highest scores, distinct ones, in `messages`: for `sft`."""
    ranked = sorted(
        (index for index in _usable(judged) if rule.may_choose(judged, index)),
        key=lambda index: (-_score(judged, index), index),
    )
    distinct: dict[str, int] = {}
    for index in ranked:
        distinct.setdefault(normalized(judged.samples[index].text), index)
    chosen = tuple(distinct.values())[: rule.top]
    rows = [_supervised(judged, index) | {"score": judged.scores[index]} | _logprobs(judged, index) for index in chosen]
    others = tuple(i for i, score in enumerate(judged.scores) if i not in chosen and score is not None)
    return Selection(rows, chosen, others if chosen else ())


def pairs(judged: JudgedPrompt, rule: SelectionRule) -> Selection:
    """A better response as `chosen` and a worse one as `rejected`, with `margin`: for `dpo` and `reward_model`."""
    found = _pairs(judged, rule)
    rows = []
    for better, worse in found:
        scores = _score(judged, better), _score(judged, worse)
        row = _prompt(judged) | {"chosen": _response(judged, better), "rejected": _response(judged, worse)}
        margin = {"margin": scores[0] - scores[1], "score_chosen": scores[0], "score_rejected": scores[1]}
        rows.append(row | margin | _beside(judged))
    return Selection(rows, tuple(better for better, _ in found), tuple(worse for _, worse in found))


def groups(judged: JudgedPrompt, rule: SelectionRule) -> Selection:
    """All distinct responses of a prompt with their scores: for `reward_model`, which compares every two."""
    distinct: dict[str, int] = {}
    for index in _usable(judged):
        if judged.scores[index] is not None:
            distinct.setdefault(judged.samples[index].text.strip(), index)
    indices = tuple(distinct.values())
    if len({judged.scores[index] for index in indices}) < 2:
        return Selection([])
    responses = [_response(judged, index) for index in indices]
    scores = [judged.scores[index] for index in indices]
    return Selection([_prompt(judged) | {"responses": responses, "scores": scores} | _beside(judged)])


def every(judged: JudgedPrompt, rule: SelectionRule) -> Selection:
    """Every response as `completion`, with `score`, and a `label` if there is a threshold: for `kto` and `sft`."""
    rows: list[dict[str, Any]] = []
    labels: dict[int, bool] = {}
    for index in _usable(judged):
        sample, score = judged.samples[index], judged.scores[index]
        row = _prompt(judged) | {"completion": _response(judged, index)}
        if rule.threshold is not None and score is not None:
            row["label"] = labels[index] = rule.may_choose(judged, index)
        elif rule.threshold is not None:
            continue
        if score is not None:
            row["score"] = score
        numbers = {"sample": index, "tokens": sample.num_tokens, "ended": sample.ended}
        rows.append(row | numbers | _logprobs(judged, index) | _beside(judged))
    chosen, rejected = (tuple(i for i, label in labels.items() if label is side) for side in (True, False))
    return Selection(rows, chosen, rejected)


SELECTIONS: Mapping[str, Callable[[JudgedPrompt, SelectionRule], Selection]] = {
    "best": best,
    "pairs": pairs,
    "groups": groups,
    "all": every,
}


def _pairs(judged: JudgedPrompt, rule: SelectionRule) -> list[tuple[int, int]]:
    """Indices of better and worse; never a tie, never two equal texts."""
    scored = [index for index in _usable(judged) if judged.scores[index] is not None]
    found, texts = [], set()
    for better, worse in itertools.permutations(scored, 2):
        margin = _score(judged, better) - _score(judged, worse)
        both = tuple(judged.samples[index].text.strip() for index in (better, worse))
        is_new = both[0] != both[1] and both not in texts
        if margin > 0 and margin >= rule.min_margin and rule.may_choose(judged, better) and is_new:
            found.append((better, worse))
            texts.add(both)
    if rule.pairs == "all" or not found:
        return found
    highest = max(_score(judged, better) for better, _ in found)
    of_best = [pair for pair in found if _score(judged, pair[0]) == highest]
    # Of several best responses the first: they are draws of one distribution.
    of_best = [pair for pair in of_best if pair[0] == of_best[0][0]]
    if rule.pairs == "random":
        return [random.Random(f"{rule.seed} {judged.number}").choice(of_best)]
    return [min(of_best, key=lambda pair: (_score(judged, pair[1]), pair[1]))]


def _usable(judged: JudgedPrompt) -> list[int]:
    """Responses that a row can hold: a blank one would be refused when it is read."""
    return [index for index, sample in enumerate(judged.samples) if text_problem(sample.text) is None]


def _score(judged: JudgedPrompt, index: int) -> float:
    score = judged.scores[index]
    assert score is not None, index
    return score


def _supervised(judged: JudgedPrompt, index: int) -> dict[str, Any]:
    """Prompt and response as one conversation; only the response is learned, not earlier answers."""
    if isinstance(judged.prompt, str):
        return {"prompt": judged.prompt, "completion": judged.samples[index].text} | _beside(judged)
    before = [message.as_template() | ({"weight": 0} if message.role == ASSISTANT else {}) for message in judged.prompt]
    return {"messages": [*before, *_response(judged, index)]} | _tools(judged) | _beside(judged)


def _prompt(judged: JudgedPrompt) -> dict[str, Any]:
    if isinstance(judged.prompt, str):
        return {"prompt": judged.prompt}
    return {"prompt": [message.as_template() for message in judged.prompt]} | _tools(judged)


def _response(judged: JudgedPrompt, index: int) -> Any:
    text = judged.samples[index].text
    return text if isinstance(judged.prompt, str) else [{"role": ASSISTANT, "content": text}]


def _logprobs(judged: JudgedPrompt, index: int) -> dict[str, Any]:
    """The stored log-probabilities of a response, if it has them."""
    teacher = judged.samples[index].teacher
    return {} if teacher is None else {COLUMN: dict(teacher)}


def _tools(judged: JudgedPrompt) -> dict[str, Any]:
    return {"tools": list(judged.tools)} if judged.tools else {}


def _beside(judged: JudgedPrompt) -> dict[str, Any]:
    """The other columns of the row, under one name, so that the file's format does not depend on them."""
    # Values of tables, such as dates, have no form in JSON.
    return {"row": json.loads(json.dumps(dict(judged.columns), default=str))} if judged.columns else {}


def length_metrics(chosen: Sequence[int], rejected: Sequence[int], *, in_pairs: bool) -> dict[str, float]:
    """Mean tokens of the responses that rows learn and learn against; in_pairs: of each other, then also how often the
    chosen one is longer, ties half.
    """
    found = {}
    if chosen:
        found["chosen_tokens"] = statistics.fmean(chosen)
    if rejected:
        found["rejected_tokens"] = statistics.fmean(rejected)
    if in_pairs and chosen:
        longer = [(one > other) + (one == other) / 2 for one, other in zip(chosen, rejected, strict=True)]
        found["longer_chosen"] = statistics.fmean(longer)
    return found
