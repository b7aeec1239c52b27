"""A policy measured on comparisons, by its implicit rewards β·log π/ρ. Apart from `evaluate_comparisons`, which starts
without torch.

    comparisons → the policy's template → tokens → log π of each response, then log ρ by the reference → judgment

Policy and reference are open one after the other. Letters: M tokens of responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.data import rows
from loopos.data.batches import ComparisonRows
from loopos.data.decoding import PLAIN_RULES, TextRules
from loopos.data.preference_tokens import EncodedComparison, encode_comparisons
from loopos.data.preferences import read_comparisons
from loopos.data.response_batches import PreferenceRows
from loopos.data.supervised_tokens import RowPolicy
from loopos.data.templates import ChatTemplate
from loopos.evaluation.comparison_judgment import ComparisonJudgment, OfResponses
from loopos.evaluation.outputs import NonFiniteOutputs
from loopos.evaluation.policy_metrics import win_rate
from loopos.functional.language_loss import TokenLogprobs
from loopos.functional.packing import PackedLayout
from loopos.models.attention import prompt_runs_once
from loopos.models.folders import GenerationModel, check_same_tokens, open_generation_model
from loopos.models.language_ensemble import LanguageEnsemble, positions_of
from loopos.models.language_model import LanguageModel
from loopos.models.resolve import ModelRef
from loopos.training.distributed import World
from loopos.training.reference import response_logprobs


@dataclass(frozen=True, kw_only=True)
class ComparisonRules:
    """How a file of comparisons is read. `as_text`: prompt and responses are texts without a template."""

    columns: Mapping[str, str]
    as_text: bool
    max_rows: int | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    text: TextRules = PLAIN_RULES


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Where models run and in which number format; None is that of their training."""

    device: str
    precision: str | None

    def model(self, ref: ModelRef) -> GenerationModel:
        """Raises `UserError`, also for an ensemble."""
        if ref.is_ensemble:
            raise UserError(f"{ref.name}: an ensemble of language models; expected a single one: name a member of it")
        return open_generation_model(ref, device=self.device, precision=self.precision)


def judge_policy(
    policy: ModelRef, reference: ModelRef | None, source: str, how: ComparisonRules, opening: Opening, *, beta: float
) -> ComparisonJudgment:
    """Scores are β·log π/ρ of the responses; without a reference β·log π/|y|, the reward of losses that have none.

    Raises `DataError`, and `UserError` for a reference with other tokens than the policy.
    """
    opened = opening.model(policy)
    tokenizer = opened.tokenizer
    reader = rows.read(source, max_rows=how.max_rows, on_bad_row=how.on_bad_row, rules=how.text)
    examples, found = read_comparisons(reader, how.columns, as_text=how.as_text)
    encoded, tokens = encode_comparisons(
        tokenizer,
        examples,
        template=ChatTemplate(tokenizer),
        max_length=opened.description.get("max_length") or positions_of(opened.model),
        policy=RowPolicy("drop", max_dropped_share=1.0, on_bad_row=how.on_bad_row),
    )
    lengths = [[float(length) for length in _lengths(row)] for row in encoded]
    own = _logprobs(opened, encoded)
    per_token = [[p / n for p, n in zip(*each, strict=True)] for each in zip(own, lengths, strict=True)]
    del opened
    if reference is None:
        rewards = [[beta * value for value in row] for row in per_token]
    else:
        start = opening.model(reference)
        check_same_tokens(tokenizer, start.tokenizer, f"--reference {reference.name}")
        base = _logprobs(start, encoded)
        rewards = [[beta * (p - q) for p, q in zip(*each, strict=True)] for each in zip(own, base, strict=True)]
    return ComparisonJudgment(
        examples,
        encoded,
        rewards,
        "reward",
        {**found.dropped, **tokens.dropped},
        more={"logprob": own, "tokens": lengths},
        added=_sides(encoded, {"rewards": rewards, "logprob": own, "logprob_per_token": per_token, "length": lengths}),
    )


@torch.no_grad()
def _logprobs(opened: GenerationModel, encoded: Sequence[EncodedComparison]) -> list[list[float]]:
    """log p of every response, nats. Raises `NonFiniteOutputs`."""
    causal = opened.model
    assert not isinstance(causal, LanguageEnsemble), "refused by Opening.model"
    causal.train(False)
    model = LanguageModel(causal)
    backbone, device = model.backbone, causal.device

    def logprobs(ids: Tensor, layout: PackedLayout, before: Tensor, targets: Tensor) -> TokenLogprobs:
        return model.logprobs(backbone(ids, layout)[before], targets)

    on_cpu = device.type == "cpu"
    runs_once = backbone.supports_shared_prefixes and prompt_runs_once((r.num_tokens for r in encoded), on_cpu=on_cpu)
    batches = PreferenceRows(ComparisonRows(encoded, device, share_prompts=runs_once))
    found = response_logprobs(logprobs, batches, [sum(_lengths(row)) for row in encoded], World())
    if not all(bool(values.isfinite().all()) for values in found):
        raise NonFiniteOutputs("log-probabilities of the responses are not finite; use --precision fp32")
    parts = (torch.split(values, _lengths(row)) for values, row in zip(found, encoded, strict=True))
    return [[float(part.double().sum()) for part in each] for each in parts]


def _lengths(row: EncodedComparison) -> list[int]:
    """Tokens that count of each response."""
    return [len(row.counted(number)) for number in range(len(row.responses))]


def _sides(encoded: Sequence[EncodedComparison], columns: Mapping[str, OfResponses]) -> dict[str, float]:
    """Means over all pairs of the chosen and of the rejected response, and how often the chosen one is the likelier."""
    pairs = [(position, pair) for position, row in enumerate(encoded) for pair in row.pairs]
    found: dict[str, float] = {}
    for name, column in columns.items():
        chosen = [column[position][pair.better] for position, pair in pairs]
        rejected = [column[position][pair.worse] for position, pair in pairs]
        found |= {f"{name}_chosen": sum(chosen) / len(pairs), f"{name}_rejected": sum(rejected) / len(pairs)}
        if name.startswith("logprob"):
            likelier = win_rate(chosen, rejected)
            key = name.replace("logprob", "likelihood")
            found |= {f"{key}_accuracy": likelier.rate, f"{key}_accuracy_low": likelier.low}
            found[f"{key}_accuracy_high"] = likelier.high
    return found
