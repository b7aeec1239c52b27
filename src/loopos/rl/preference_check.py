"""What validation generates in preference optimization: the policy's answers to the prompts of the validation rows.

    distinct prompts → answers of the start, kept as scores → answers at a validation → win rate, KL, length, samples

The measuring is `collector.PolicyCheck`, as in PPO; here no reward model takes part in training, and only a judge
scores. The state of a run beyond its weights is `PreferenceState`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.config.preference import PreferenceConfig
from loopos.data.digest import prompts_digest
from loopos.data.preference_tokens import Origin
from loopos.data.preferences import Comparison
from loopos.data.prompts import prompt_text
from loopos.generation.engine import Engine
from loopos.models.active_adapters import AdapterView
from loopos.models.language_model import LanguageModel
from loopos.models.load import NUMBER_FORMATS, Pretrained, cast_parameters
from loopos.rl.collector import Collector, sampling_of
from loopos.rl.policy_check import PolicyCheck
from loopos.rl.preference_monitor import PreferenceMonitor
from loopos.rl.rewards import judge_of
from loopos.rl.roles import ActorCritic, Reference, without_dropout
from loopos.rl.workers.protocol import LocalRollouts
from loopos.training.callbacks import preserve_random_states
from loopos.training.distributed import World

# A validation already has "kl" (KTO's baseline) and "entropy" of the data's own responses.
_NAMES = {"kl": "response_kl", "entropy": "response_entropy"}
# Of the start's answers against themselves: every prompt is a tie.
_EVEN = 0.5


def start_copy(pretrained: Pretrained, config: PreferenceConfig, precision: str) -> LanguageModel | None:
    """A frozen copy of the weights that training starts from, where `evaluation.reference_copy` asks for one and all
    weights train; call it before any weight changes.
    """
    if not config.copies_start:
        return None
    causal = copy.deepcopy(pretrained.model).requires_grad_(False)
    cast_parameters(causal, NUMBER_FORMATS["bf16" if precision == "bf16" else "fp32"])
    model = LanguageModel(causal, attention=config.model.attention)
    without_dropout(model)
    return model


@dataclass(frozen=True)
class ValidationPrompts:
    """Distinct prompts of validation rows. `ids`: of each; `origins`: ids → text, location and row; `references`: the
    preferred answer of the data to each, "" where it has none.
    """

    ids: list[list[int]]
    origins: Mapping[tuple[int, ...], Origin]
    references: list[str]

    @classmethod
    def of(
        cls, rows: Iterable[tuple[list[int], Comparison, int | None]], *, number: int, longest: int | None
    ) -> ValidationPrompts:
        """The first `number` distinct prompts of at most `longest` tokens. rows: the ids of a prompt, its row, and the
        index of the response that people preferred. Raises `UserError` if no prompt is short enough.
        """
        origins: dict[tuple[int, ...], Origin] = {}
        references: list[str] = []
        for prompt, comparison, preferred in rows:
            ids = tuple(prompt)
            if len(origins) == number or ids in origins or (longest is not None and len(ids) > longest):
                continue
            origins[ids] = Origin(prompt_text(comparison.prompt), comparison.row.location, comparison.row.values)
            response = "" if preferred is None else comparison.responses[preferred]
            references.append(response if isinstance(response, str) else response[-1].content)
        if not origins:
            raise UserError(
                f"evaluation.prompts: every validation prompt is over {longest} tokens (max_length − "
                "generation.max_new_tokens); expected shorter prompts, or a smaller generation.max_new_tokens"
            )
        return cls([list(ids) for ids in origins], origins, references)


@dataclass(frozen=True)
class _Models:
    """`collector.Models` of a run without a value model."""

    actor_critic: ActorCritic
    reference: Reference | None


@dataclass(frozen=True)
class GeneratingPolicy:
    """The policy in training as the check reads it. `start`: a copy of the starting weights, None without one;
    `stop_tokens`: ids that end a response.
    """

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: tuple[int, ...]
    start: LanguageModel | None

    def models(self, *, has_start: bool, temperature: float) -> _Models:
        """The policy, and the start if it can run: the copy, or the model without its adapters. has_start: whether that
        is the start.
        """
        reference = None
        if self.start is not None:
            reference = Reference(self.start, self.start.backbone, temperature=temperature)
        elif has_start:
            reference = Reference(self.model, AdapterView(self.model.backbone, None), temperature=temperature)
        return _Models(ActorCritic(self.model, None, shares_states=False, temperature=temperature), reference)


class GeneratedAnswers:
    """Answers of a policy in training to the same prompts with the same seeds, judged against those of the start."""

    def __init__(
        self,
        config: PreferenceConfig,
        prompts: ValidationPrompts,
        policy: GeneratingPolicy,
        *,
        device: torch.device,
        world: World,
    ) -> None:
        """Raises `UserError` for a judge that cannot be opened."""
        section, generation, seed = config.evaluation, config.generation, config.training.seed
        assert section is not None, "config.generates"
        judge = None
        if section.judge is not None:
            judge = judge_of(section.judge, policy.tokenizer, device, is_function=section.judge_is_function)
        engine = Engine(policy.model.causal, policy.tokenizer)
        self.summary = f"validation answers {len(prompts.ids)} prompts; {engine.summary}"
        self._prompts = prompts
        collector = Collector(
            LocalRollouts(engine, data_parallel=world.data_parallel),
            policy.models(has_start=config.starts_without_adapters, temperature=generation.temperature),
            None,
            device=device,
            origins=prompts.origins,
            gather=world.gather_data_parallel,
        )
        sampling = sampling_of(generation, stop_token_ids=policy.stop_tokens, seed=seed)
        self._check = PolicyCheck(collector, prompts.ids, sampling, judge, estimator=section.kl_report, kl_limit=None)
        # Scores are comparable only where all of these are equal.
        self._request = {
            "prompts": prompts_digest(prompts.ids),
            "judge": section.judge,
            "seed": seed,
            **generation.model_dump(mode="json"),
        }

    def measure(self, *, is_start: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and one record per prompt, the same on every rank, as `PolicyCheck.measure` returns them. The win
        rate of the start is that against itself.
        """
        # A judge of the user may draw random numbers.
        with preserve_random_states():
            metrics, records = self._check.measure(is_start=is_start)
        metrics = {_NAMES.get(name, name): value for name, value in metrics.items()}
        if is_start and "judge" in metrics:
            metrics["win_rate"] = _EVEN
        references = self._prompts.references
        return metrics, [{**each, "reference": text} for each, text in zip(records, references, strict=True)]

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: the scores of the start's answers, and the request they answer."""
        return {"request": self._request, "check": self._check.state()}

    def load(self, state: Mapping[str, Any]) -> str:
        """Restores `state`, unless the answers are now to other prompts, sampled otherwise or judged by another: then
        there are no win rates, and a sentence for the user says so.
        """
        if state["request"] == self._request:
            self._check.load(state["check"])
            return ""
        changed = ", ".join(name for name, value in self._request.items() if state["request"].get(name) != value)
        return f"validation has no win rates from here on: the start answered with another setting ({changed})"


@dataclass
class PreferenceState:
    """State of a run of preference optimization beyond weights and optimizer: that of its monitor, and the scores of
    the start's answers.
    """

    monitor: PreferenceMonitor
    answers: GeneratedAnswers | None
    warn: Callable[[str], None]

    def synchronize(self, world: World) -> None:
        """Every rank has the same state."""

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"monitor": self.monitor.state(), "answers": None if self.answers is None else self.answers.state()}

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.monitor.load(state["monitor"])
        if self.answers is not None and state["answers"] is not None:
            sentence = self.answers.load(state["answers"])
            if sentence:
                self.warn(sentence)
