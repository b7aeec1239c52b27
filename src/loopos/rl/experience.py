"""Experience: the rollouts of one iteration with advantages and returns, and packed batches of them.

Letters: B responses of an iteration over all processes, L tokens of the longest, T tokens of a packed row, M tokens of
responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from loopos.config.rl import PpoTrainingSection
from loopos.data.batches import Cursor
from loopos.functional.advantages import KlEstimator, kl_terms, token_rewards, truncated_importance, whitened
from loopos.functional.packing import PackedLayout
from loopos.rl.algorithms import PPO, AdvantageInputs, Algorithm

PolicyOutputs: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Log-probabilities, entropies and values, each `[M]`; no values without a critic."""


@dataclass(frozen=True)
class ResponseBatch:
    """Prompts and responses of one forward pass, packed.

    `ids` `[T]`. `positions` `[M]`: positions whose hidden states predict the tokens `targets` `[M]`; each is the
    position before its token. `columns`: `old_logprobs`, `advantages`, with a reference `reference_logprobs`, with a
    critic `values` (old) and `returns`, `[M]` fp32. `is_first`: the policy has not changed since it generated the
    responses. `responses` `[M]`: the index among `rows` of the response that a token belongs to.
    """

    ids: Tensor
    layout: PackedLayout
    positions: Tensor
    targets: Tensor
    rows: tuple[int, ...]
    columns: Mapping[str, Tensor]
    responses: Tensor
    is_first: bool = False

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens


@dataclass(frozen=True)
class ResponseRows:
    """Prompts with responses, as rows of `ResponseBatch`es. columns: name → one value per token of each response."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    device: torch.device
    columns: Mapping[str, Sequence[Tensor]] | None = None

    @cached_property
    def lengths(self) -> list[int]:
        return [len(prompt) + len(response) for prompt, response in zip(self.prompts, self.responses, strict=True)]

    def __call__(self, rows: Sequence[int], *, is_first: bool = False) -> ResponseBatch:
        ids: list[int] = []
        positions: list[int] = []
        for row in rows:
            positions += range(len(ids) + len(self.prompts[row]) - 1, len(ids) + self.lengths[row] - 1)
            ids += [*self.prompts[row], *self.responses[row]]
        flat = torch.tensor(ids, device=self.device)
        lengths = torch.tensor([len(self.responses[row]) for row in rows])
        before = torch.tensor(positions, device=self.device)
        columns = {name: torch.cat([column[row] for row in rows]) for name, column in (self.columns or {}).items()}
        return ResponseBatch(
            ids=flat,
            layout=PackedLayout(tuple(self.lengths[row] for row in rows), self.device),
            positions=before,
            targets=flat[before + 1],
            rows=tuple(rows),
            columns={name: column.to(self.device) for name, column in columns.items()},
            responses=torch.repeat_interleave(torch.arange(len(rows)), lengths).to(self.device),
            is_first=is_first,
        )


@dataclass(eq=False)
class ReusedForward:
    """Stores the forward pass that scores an iteration's responses, with its autograd graph, for the first optimizer
    step.

    It can be reused if the first step is a single batch of all responses: the model has not changed since. `rows_of`:
    (step, length of each row) → the rows of each batch of the step.
    """

    rows_of: Callable[[Cursor, Sequence[int]], list[list[int]]]
    _stored: tuple[ResponseBatch, PolicyOutputs] | None = None

    def batch(self, rows: ResponseRows, iteration: int) -> ResponseBatch | None:
        """The batch of the iteration's first step if it contains all rows; None if the step has several batches."""
        batches = self.rows_of(Cursor(iteration), rows.lengths)
        return rows(batches[0]) if len(batches) == 1 and len(batches[0]) == len(rows.lengths) else None

    def keep(self, batch: ResponseBatch, outputs: PolicyOutputs) -> None:
        self._stored = batch, outputs

    def take(self, batch: ResponseBatch) -> PolicyOutputs | None:
        """Returns the stored outputs for exactly this batch and clears them; after a step they are outdated."""
        stored, self._stored = self._stored, None
        if stored is None or stored[0].rows != batch.rows or not torch.equal(stored[0].ids, batch.ids):
            return None
        return stored[1]


_COLUMNS = ("old_logprobs", "reference_logprobs", "values", "advantages", "returns")
# The rest is there only with a reference or a critic.
_ALWAYS = ("old_logprobs", "advantages")


@dataclass(frozen=True)
class Experience:
    """The responses of one iteration from all processes. The tensors are `[M]` fp32 on CPU, concatenated over
    responses; None for those of a reference or a critic that the run does not have. `kl_coefficient`: β of the penalty
    in the rewards. `is_own`: `old_logprobs` are those of the policy before its update, so that its first ratio is 1;
    otherwise those of an older policy.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    old_logprobs: Tensor
    reference_logprobs: Tensor | None
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    kl_coefficient: float
    is_own: bool = True

    def rows(self, device: torch.device) -> ResponseRows:
        lengths = [len(response) for response in self.responses]
        columns = {name: torch.split(column, lengths) for name, column in self._columns().items()}
        return ResponseRows(self.prompts, self.responses, device, columns)

    def _columns(self) -> dict[str, Tensor]:
        return {name: column for name in _COLUMNS if (column := getattr(self, name)) is not None}

    def tensors(self) -> dict[str, Tensor]:
        """All fields except `kl_coefficient` and `is_own`, for a checkpoint."""
        stored = self._columns()
        for name, texts in (("prompts", self.prompts), ("responses", self.responses)):
            stored[name] = torch.tensor([token for ids in texts for token in ids])
            stored[f"{name}_lengths"] = torch.tensor([len(ids) for ids in texts])
        return stored

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], kl_coefficient: float, *, is_own: bool) -> Experience:
        """Restores the experience from `tensors`."""
        texts = {
            name: [part.tolist() for part in torch.split(tensors[name], tensors[f"{name}_lengths"].tolist())]
            for name in ("prompts", "responses")
        }
        columns = {name: tensors[name].clone() if name in tensors else None for name in _COLUMNS}
        assert all(columns[name] is not None for name in _ALWAYS), sorted(tensors)
        named: dict[str, Any] = {**texts, **columns}
        return cls(**named, kl_coefficient=kl_coefficient, is_own=is_own)


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """How scores become advantages. `penalty`: KL estimator of the penalty in the rewards; None if the KL is a loss
    instead. `importance_cap`: bound of π/μ, if advantages are multiplied by it.
    `responses_per_prompt`: so many responses to one prompt follow each other.
    """

    penalty: KlEstimator | None
    discount: float
    gae_lambda: float
    whiten_rewards: bool
    whiten_advantages: bool
    importance_cap: float | None = None
    algorithm: Algorithm = PPO
    responses_per_prompt: int = 1

    @classmethod
    def of(
        cls,
        settings: PpoTrainingSection,
        algorithm: Algorithm,
        *,
        importance_cap: float | None = None,
        responses_per_prompt: int = 1,
    ) -> AdvantageSettings:
        """From a config's `training` section."""
        return cls(
            penalty=settings.penalty_estimator if settings.kl_in == "reward" else None,
            discount=settings.discount,
            gae_lambda=settings.gae_lambda,
            whiten_rewards=settings.whiten_rewards,
            whiten_advantages=settings.whiten_advantages,
            importance_cap=importance_cap,
            algorithm=algorithm,
            responses_per_prompt=responses_per_prompt,
        )


class Response(Protocol):
    """Tokens that a policy generated."""

    @property
    def ids(self) -> Sequence[int]: ...


class Scored(Protocol):
    """A response with its score and one value per token `[L]`: log-probabilities of the policy before its update
    (`logprobs`), of the generating policy (`engine_logprobs`, `staleness` iterations older) and of the reference, and
    values; the last two are None for a run without.
    """

    @property
    def response(self) -> Response: ...
    @property
    def score(self) -> float: ...
    @property
    def logprobs(self) -> Tensor: ...
    @property
    def engine_logprobs(self) -> Tensor: ...
    @property
    def reference_logprobs(self) -> Tensor | None: ...
    @property
    def values(self) -> Tensor | None: ...
    @property
    def staleness(self) -> int: ...


def experience_of(
    prompts: Sequence[Sequence[int]],
    scored: Sequence[Scored],
    *,
    old_logprobs: Literal["forward", "engine"],
    kl_coefficient: float,
    settings: AdvantageSettings,
) -> Experience:
    """Advantages and returns of responses: token rewards r_t = −β·kl_t, plus the score at the last token; the
    algorithm's advantages; whitening over all tokens; importance weights. A score of NaN, of a response that no reward
    judged, gives advantages of 0, and as returns the values. old_logprobs: denominator of the ratio, the
    policy before its update or the generating policy.
    """
    responses, by_engine = [each.response.ids for each in scored], old_logprobs == "engine"
    lengths = torch.tensor([len(response) for response in responses])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # [B, L]

    behavior = _padded([each.engine_logprobs for each in scored])
    old = behavior if by_engine else _padded([each.logprobs for each in scored])
    reference = _padded_or_none([each.reference_logprobs for each in scored])
    state_values = _padded_or_none([each.values for each in scored])
    scores = torch.tensor([each.score for each in scored])
    groups = torch.arange(len(scored)) // settings.responses_per_prompt
    is_judged = ~scores.isnan()
    scores, learned = _imputed(scores, groups), mask & is_judged[:, None]
    penalty = torch.zeros_like(old)
    if reference is None:
        assert kl_coefficient == 0, "a KL penalty has a reference"
    elif settings.penalty is not None:
        penalty = kl_terms(old, reference, settings.penalty)
    rewards = token_rewards(scores, penalty, mask, kl_coefficient=kl_coefficient)
    if settings.whiten_rewards:
        rewards = whitened(rewards, learned, shift_mean=False)
    inputs = AdvantageInputs(
        scores=scores,
        rewards=rewards,
        mask=mask,
        groups=groups,
        judged=is_judged,
        values=state_values,
        discount=settings.discount,
        gae_lambda=settings.gae_lambda,
    )
    advantages, returns = settings.algorithm.advantages(inputs)
    if settings.whiten_advantages:
        advantages = whitened(advantages, learned)
    # As in TRL: an answer that no reward judged counts as a row of the step and moves nothing.
    advantages = advantages.where(learned, 0.0)
    if returns is not None and state_values is not None:
        returns = returns.where(learned, state_values)
    if settings.importance_cap is not None:
        # Every term of the policy loss is proportional to A, so weighting A weights the loss.
        advantages = advantages * truncated_importance(old, behavior, cap=settings.importance_cap)
    return Experience(
        [list(prompt) for prompt in prompts],
        [list(response) for response in responses],
        old_logprobs=old[mask],
        reference_logprobs=None if reference is None else reference[mask],
        values=None if state_values is None else state_values[mask],
        advantages=advantages[mask],
        returns=None if returns is None else returns[mask],
        kl_coefficient=kl_coefficient,
        is_own=not by_engine or not any(each.staleness for each in scored),
    )


def _imputed(scores: Tensor, groups: Tensor) -> Tensor:
    """Scores `[B]` with the mean of the judged ones of its group for NaN, or of all judged ones: a baseline by mean
    stays what it is over the judged responses.
    """
    found = scores.clone()
    for index in scores.isnan().nonzero().flatten().tolist():
        mean = scores[groups == groups[index]].nanmean()
        found[index] = scores.nanmean().nan_to_num(0.0) if mean.isnan() else mean
    return found


def _padded(columns: Sequence[Tensor]) -> Tensor:
    """`[L]` of each response → `[B, L]` fp32."""
    return torch.nn.utils.rnn.pad_sequence([column.float() for column in columns], batch_first=True)


def _padded_or_none(columns: Sequence[Tensor | None]) -> Tensor | None:
    present = [column for column in columns if column is not None]
    return _padded(present) if present else None


assert set(_COLUMNS) < {field.name for field in fields(Experience)}
