"""The options of commands that sample: their values before the checks, as settings, and their conflicts.

Names, defaults, help texts and ranges are those of `generation.settings`. All problems are reported at once, under the
names of the options, before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from loopos.cli.options import option
from loopos.config.diagnostics import UserError
from loopos.generation.settings import SamplingFields, SamplingParams

if TYPE_CHECKING:
    from loopos.config.keys import Strategy
    from loopos.config.preferences import Aggregation
    from loopos.evaluation.reasoning import Ranker
    from loopos.generation.steps import StepLimits
    from loopos.models.resolve import ModelRef

# Options that matter only when tokens are sampled.
_OF_DRAWS = ("top_k", "top_p", "min_p", "typical_p")

StrategyName = Annotated[
    str,
    typer.Option("--strategy", help="Answer strategy: single, self_consistency:8, best_of_n:4 or step_beam:2x4."),
]


RankingModel = Annotated[
    str | None,
    typer.Option(
        "--reward-model", help="Reward model that ranks chains: of best_of_n, or, scoring each step, of step_beam."
    ),
]
AggregationName = Annotated[
    str | None,
    typer.Option("--aggregation", help="Score of a process reward model: product, min or last of its steps."),
]


def aggregation_diagnostics(aggregation: str | None) -> Iterator[str]:
    """An unknown aggregation."""
    from loopos.config.preferences import Aggregation

    if aggregation is not None and aggregation not in get_args(Aggregation):
        yield f"--aggregation: got {aggregation}; expected one of {', '.join(get_args(Aggregation))}"


def ranking_diagnostics(strategy: Strategy, reward_model: str | None, aggregation: str | None) -> Iterator[str]:
    """Conflicts between a strategy and the reward model that ranks its chains."""
    from loopos.config.keys import RANKED

    if reward_model is not None and strategy.kind not in RANKED:
        yield (
            "--reward-model: ranks the chains of --strategy best_of_n:N or step_beam:BxK; use both, for example "
            "best_of_n:4"
        )
    if aggregation is not None and reward_model is None:
        yield "--aggregation without --reward-model: it makes one score of those of a process reward model"
    yield from aggregation_diagnostics(aggregation)


def require_ranking_model(strategy: Strategy, reward_model: str | None, aggregation: str | None) -> ModelRef | None:
    """The reward model that ranks chains; None without one. Raises `UserError` for what cannot rank those of the
    strategy: unfinished chains need a score for each step.
    """
    if reward_model is None:
        return None
    from loopos.cli.opened_models import require_reward_model

    found = require_reward_model(reward_model)
    scores_steps = found.description.get("process") is not None
    if strategy.kind == "step_beam" and not scores_steps:
        raise UserError(
            f"--reward-model {reward_model}: scores whole responses, but step_beam ranks unfinished chains; expected a "
            "process reward model, which reward_model trains on rows with prompt, completions and labels"
        )
    if aggregation is not None and not scores_steps:
        raise UserError(f"--aggregation {aggregation}: {reward_model} scores whole responses, which have no steps")
    return found


def ranker_of(reward_model: ModelRef | None, aggregation: str | None, device: str) -> Ranker | None:
    """What ranks chains; None: the model's own logprobs. Imports torch."""
    if reward_model is None:
        return None
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.training.precision import pick_device

    chosen = cast("Aggregation | None", aggregation)
    return RewardPredictor.open(reward_model, device=pick_device(device).type, aggregation=chosen).rank_chains


def changed_fields(options: Any) -> list[str]:
    """The fields of a dataclass that differ from their defaults; fields without a default are left out."""
    return [
        each.name
        for each in fields(options)
        if each.default is not MISSING and getattr(options, each.name) != each.default
    ]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(SamplingFields):
    """The sampling options as they were written; out of range they are messages, not an exception."""

    def settings(self) -> SamplingParams:
        """The settings. Raises `UserError` with every value out of its range."""
        return SamplingParams(**asdict(self))

    def changed(self) -> list[str]:
        """Fields that differ from their defaults."""
        return changed_fields(self)

    def diagnostics(self) -> Iterator[str]:
        """Values out of their ranges."""
        for name, problem in self.out_of_range():
            yield f"{option(name)}: {problem}"

    def notes(self) -> Iterator[str]:
        """Options that have no effect."""
        idle = [option(name) for name in self.changed() if name in _OF_DRAWS]
        if self.temperature == 0 and idle:
            yield f"note: {', '.join(idle)} has no effect at --temperature 0, which takes the most likely token"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """Limits on steps and chains (tokens, except `max_steps`); None = no limit."""

    max_steps: int | None = field(default=None, metadata={"help": "Reasoning steps before the answer is forced."})
    max_step_tokens: int | None = field(default=None, metadata={"help": "Maximum tokens per step."})
    min_thinking_tokens: int = field(default=0, metadata={"help": "Minimum reasoning tokens before the answer."})
    max_thinking_tokens: int | None = field(
        default=None, metadata={"help": "Reasoning tokens before the answer is forced."}
    )

    def changed(self) -> list[str]:
        """Fields that differ from their defaults."""
        return changed_fields(self)

    def diagnostics(self, max_new_tokens: int) -> Iterator[str]:
        """Values out of range or in conflict."""
        for name in self.changed():
            least = 0 if name == "min_thinking_tokens" else 1
            if getattr(self, name) < least:
                yield f"{option(name)}: got {getattr(self, name)}; expected {least} or more"
        most = self.max_thinking_tokens
        if most is not None and most < self.min_thinking_tokens:
            actual = self.min_thinking_tokens
            yield f"--min-thinking-tokens: got {actual}; expected at most --max-thinking-tokens {most}"
        for name in ("min_thinking_tokens", "max_thinking_tokens"):
            value = getattr(self, name)
            if value is not None and value >= max_new_tokens:
                expected = f"fewer than --max-new-tokens {max_new_tokens}, so that an answer can follow"
                yield f"{option(name)}: got {value}; expected {expected}"

    def limits(self) -> StepLimits:
        """The limits as generation takes them; imports torch."""
        from loopos.generation.steps import StepLimits

        return StepLimits(**asdict(self))


def parsed_strategy(text: str, diagnostics: list[str]) -> Strategy:
    """The strategy `text`; for an invalid one `single`, with a message added to `diagnostics`."""
    from loopos.config.keys import Strategy

    try:
        return Strategy.parse(text)
    except ValueError as error:
        diagnostics.append(f"--strategy: got {error}")
        return Strategy()


def chain_diagnostics(strategy: Strategy, name: str, *, samples: int, temperature: float) -> Iterator[str]:
    """Conflicts between a strategy, a number of samples and a temperature."""
    if samples < 1:
        yield f"--samples: got {samples}; expected 1 or more"
    if samples > 1 and strategy.kind != "single":
        yield f"--samples {samples} with --strategy {name}: the strategy sets the number of samples; use one of the two"
    several = f"--strategy {name}" if strategy.chains > 1 else f"--samples {samples}" if samples > 1 else ""
    if several and temperature == 0:
        yield f"{several} at --temperature 0: all chains would be equal; use a temperature above 0, for example 0.7"
