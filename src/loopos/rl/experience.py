"""Experience: the rollouts of one iteration with advantages and returns, and packed batches of them.

Letters: B responses of an iteration over all processes, L tokens of the longest, T tokens of a packed row, M tokens of
responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from loopos.config.rl import PpoTrainingSection
from loopos.data.batches import Cursor
from loopos.data.preference_tokens import counted
from loopos.functional.advantages import (
    Baseline,
    KlEstimator,
    Scale,
    kl_terms,
    token_rewards,
    truncated_importance,
    whitened,
)
from loopos.functional.packing import PackedLayout
from loopos.models.attention import FUSED_FROM
from loopos.rl.algorithms import PPO, AdvantageInputs, Algorithm

PolicyOutputs: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Log-probabilities, entropies and values, each `[M]`; no values without a critic."""


@dataclass(frozen=True)
class ResponseBatch:
    """Prompts and responses of one forward pass, packed.

    `ids` `[T]`. `positions` `[M]`: positions whose hidden states predict the tokens `targets` `[M]`; each is the
    position before its token. Responses to one prompt that follow each other may share its tokens. `columns`:
    `old_logprobs`, `advantages`, with a reference `reference_logprobs`, with a critic `values` (old) and `returns`,
    `[M]` fp32. `is_first`: the policy has not changed since it generated the responses. `responses` `[M]`: the index
    among `rows` of the response that a token belongs to. `lengths`: tokens of each response that the model wrote, which
    `targets` are; `learned`: whether it has a loss.
    """

    ids: Tensor
    layout: PackedLayout
    positions: Tensor
    targets: Tensor
    rows: tuple[int, ...]
    columns: Mapping[str, Tensor]
    responses: Tensor
    lengths: tuple[int, ...]
    learned: tuple[bool, ...]
    is_first: bool = False

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens


@dataclass(frozen=True)
class ResponseRows:
    """Prompts with responses, as rows of `ResponseBatch`es. columns: name → one value per token of each response.
    learned: whether each response has a loss; all when None. share_prompts: run a prompt once for its responses that
    follow each other here. masks: which tokens of each response the model wrote, all when None; the others are context,
    and columns have no value for them.
    """

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    device: torch.device
    columns: Mapping[str, Sequence[Tensor]] | None = None
    learned: Sequence[bool] | None = None
    share_prompts: bool = False
    masks: Sequence[Sequence[bool]] | None = None

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(prompt) + len(response) for prompt, response in zip(self.prompts, self.responses, strict=True)]

    @cached_property
    def groups(self) -> list[list[int]]:
        """Rows that follow each other and may share their prompt, else each row alone. A group is as long as the dense
        attention of shared prompts allows.
        """
        found: list[list[int]] = []
        tokens = 0
        for row, prompt in enumerate(self.prompts):
            tokens += len(self.responses[row])
            fits = self.share_prompts and tokens < FUSED_FROM
            if found and fits and prompt == self.prompts[found[-1][0]]:
                found[-1].append(row)
            else:
                found.append([row])
                tokens = self.lengths[row]
        return found

    @cached_property
    def _group_of(self) -> list[int]:
        return [number for number, group in enumerate(self.groups) for _ in group]

    def by_group(self) -> GroupedRows:
        """The groups as rows."""
        return GroupedRows(self)

    def __call__(self, rows: Sequence[int], *, is_first: bool = False) -> ResponseBatch:
        ids: list[int] = []
        positions: list[int] = []
        segments: list[tuple[int, ...]] = []
        ordered: list[int] = []
        targets: list[int] = []
        lengths: list[int] = []
        for group in self._together(rows):
            prompt = self.prompts[group[0]]
            ids += prompt
            last = len(ids) - 1
            for row in group:
                response, written = self.responses[row], self.written(row)
                # The first token of a response is predicted by the last token of the prompt.
                before = [last, *range(len(ids), len(ids) + len(response) - 1)]
                positions += [before[index] for index in written]
                targets += [response[index] for index in written]
                lengths.append(len(written))
                ids += response
            segments.append((len(prompt), *(len(self.responses[row]) for row in group)))
            ordered += group
        flat = torch.tensor(ids, device=self.device)
        columns = {name: torch.cat([column[row] for row in ordered]) for name, column in (self.columns or {}).items()}
        return ResponseBatch(
            ids=flat,
            layout=self._layout(segments),
            positions=torch.tensor(positions, device=self.device),
            targets=torch.tensor(targets, device=self.device),
            rows=tuple(ordered),
            columns={name: column.to(self.device) for name, column in columns.items()},
            responses=torch.repeat_interleave(torch.arange(len(ordered)), torch.tensor(lengths)).to(self.device),
            lengths=tuple(lengths),
            learned=tuple(self.learned is None or self.learned[row] for row in ordered),
            is_first=is_first,
        )

    def written(self, row: int) -> Sequence[int]:
        """The indices of the tokens of a response that the model wrote."""
        return counted(self.responses[row], None if self.masks is None else self.masks[row])

    def _together(self, rows: Sequence[int]) -> list[list[int]]:
        """Rows of one group together, in the order of the first of each."""
        found: dict[int, list[int]] = {}
        for row in rows:
            found.setdefault(self._group_of[row], []).append(row)
        return list(found.values())

    def _layout(self, segments: Sequence[tuple[int, ...]]) -> PackedLayout:
        if all(len(each) == 2 for each in segments):
            return PackedLayout(tuple(map(sum, segments)), self.device)
        return PackedLayout.of_shared_prefixes(segments, self.device)


@dataclass(frozen=True)
class GroupedRows:
    """The groups of `rows` as rows."""

    rows: ResponseRows

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each group, its prompt once."""
        rows = self.rows
        return [len(rows.prompts[group[0]]) + sum(len(rows.responses[row]) for row in group) for group in rows.groups]

    def __call__(self, rows: Sequence[int]) -> ResponseBatch:
        return self.rows([row for group in rows for row in self.rows.groups[group]])


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
    otherwise those of an older policy. `learned`: whether each response has a loss; None = all. `masks`: which tokens
    of each response the policy wrote; None = all. M counts only those.
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
    learned: list[bool] | None = None
    masks: list[list[bool]] | None = None

    def rows(self, device: torch.device, *, share_prompts: bool = False) -> ResponseRows:
        """Rows of batches."""
        rows = ResponseRows(
            self.prompts, self.responses, device, learned=self.learned, share_prompts=share_prompts, masks=self.masks
        )
        lengths = [len(rows.written(row)) for row in range(len(self.responses))]
        return replace(rows, columns={name: torch.split(each, lengths) for name, each in self._columns().items()})

    def _columns(self) -> dict[str, Tensor]:
        return {name: column for name in _COLUMNS if (column := getattr(self, name)) is not None}

    def tensors(self) -> dict[str, Tensor]:
        """All fields except `kl_coefficient` and `is_own`, for a checkpoint."""
        stored = self._columns()
        for name, texts in (("prompts", self.prompts), ("responses", self.responses)):
            stored[name] = torch.tensor([token for ids in texts for token in ids])
            stored[f"{name}_lengths"] = torch.tensor([len(ids) for ids in texts])
        if self.learned is not None:
            stored["learned"] = torch.tensor(self.learned)
        if self.masks is not None:
            stored["masks"] = torch.tensor([is_written for mask in self.masks for is_written in mask])
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
        learned = tensors["learned"].tolist() if "learned" in tensors else None
        masks = None
        if "masks" in tensors:
            masks = [each.tolist() for each in torch.split(tensors["masks"], tensors["responses_lengths"].tolist())]
        named: dict[str, Any] = {**texts, **columns, "learned": learned, "masks": masks}
        return cls(**named, kl_coefficient=kl_coefficient, is_own=is_own)


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """How scores become advantages. `penalty`: KL estimator of the penalty in the rewards; None if the KL is a loss
    instead. `importance_cap`: bound of π/μ, if advantages are multiplied by it.
    `responses_per_prompt`: so many responses to one prompt follow each other. `baseline`, `scale`: of relative
    advantages. `mask_truncated`: responses without their end have no loss.
    """

    penalty: KlEstimator | None
    discount: float
    gae_lambda: float
    whiten_rewards: bool
    whiten_advantages: bool
    importance_cap: float | None = None
    algorithm: Algorithm = PPO
    responses_per_prompt: int = 1
    baseline: Baseline = "group"
    scale: Scale = "group"
    mask_truncated: bool = False

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
            baseline=settings.advantage_baseline,
            scale=settings.advantage_scale,
            mask_truncated=settings.mask_truncated,
        )

    def inputs(
        self, scores: Tensor, rewards: Tensor, mask: Tensor, *, groups: Tensor, judged: Tensor, values: Tensor | None
    ) -> AdvantageInputs:
        """What the algorithm's advantages are computed from."""
        return AdvantageInputs(
            scores=scores,
            rewards=rewards,
            mask=mask,
            groups=groups,
            judged=judged,
            values=values,
            discount=self.discount,
            gae_lambda=self.gae_lambda,
            baseline=self.baseline,
            scale=self.scale,
        )


class Response(Protocol):
    """Tokens after a prompt, which of them the policy wrote (None = all), and whether they have their end."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def mask(self) -> list[bool] | None: ...
    @property
    def ended(self) -> bool: ...


class Scored(Protocol):
    """A response with its score and one value per token that the policy wrote `[L]`: log-probabilities of the policy
    before its update (`logprobs`; None where no forward pass measured them), of the generating policy
    (`engine_logprobs`, `staleness` iterations older) and of the reference, and values; the last two are None for a run
    without.
    """

    @property
    def response(self) -> Response: ...
    @property
    def score(self) -> float: ...
    @property
    def logprobs(self) -> Tensor | None: ...
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
    policy before its update, measured by a forward pass or where there is none by generation, or the generating policy.
    """
    responses, by_engine = [each.response.ids for each in scored], old_logprobs == "engine"
    # Tokens that the policy did not write are no actions: they are context, between the token before and the next.
    mask = _mask_of([len(each.engine_logprobs) for each in scored])
    behavior = _padded([each.engine_logprobs for each in scored])
    measured = None if by_engine else _padded_or_none([each.logprobs for each in scored])
    old = behavior if measured is None else measured
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
    inputs = settings.inputs(scores, rewards, mask, groups=groups, judged=is_judged, values=state_values)
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
        learned=[each.response.ended for each in scored] if settings.mask_truncated else None,
        masks=_masks_of([each.response for each in scored]),
    )


def _masks_of(responses: Sequence[Response]) -> list[list[bool]] | None:
    """Which tokens of each response the policy wrote; None where it wrote all."""
    if all(each.mask is None for each in responses):
        return None
    return [[True] * len(each.ids) if each.mask is None else each.mask for each in responses]


def _mask_of(lengths: Sequence[int]) -> Tensor:
    """`[B, L]`: True for the tokens of each response, of these lengths."""
    each = torch.tensor(lengths)
    return torch.arange(int(each.max()))[None] < each[:, None]


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
