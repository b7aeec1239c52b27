"""The sampling options of commands: their values as settings, and their conflicts.

All problems are reported at once, under the names of the options, before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from loopos.config.diagnostics import UserError
from loopos.config.keys import Strategy
from loopos.generation.settings import SamplingParams

if TYPE_CHECKING:
    from loopos.generation.steps import StepLimits

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
# Options that matter only when tokens are sampled.
_OF_DRAWS = ("top_k", "top_p", "min_p", "typical_p")


def option(name: str) -> str:
    """The option for a field name."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are sampled and when a completion ends; as `SamplingParams`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0

    def settings(self) -> SamplingParams:
        """The settings. Raises `UserError` with every value out of its range."""
        return SamplingParams(**{each.name: getattr(self, each.name) for each in fields(self)})

    def changed(self) -> list[str]:
        """Fields that differ from their defaults."""
        return [each.name for each in fields(self) if getattr(self, each.name) != each.default]

    def diagnostics(self) -> Iterator[str]:
        """Values out of their ranges."""
        try:
            self.settings()
        except UserError as error:
            yield from (
                f"--{line.partition(':')[0].replace('_', '-')}:{line.partition(':')[2]}" for line in _lines(error)
            )

    def notes(self) -> Iterator[str]:
        """Options that have no effect."""
        idle = [option(name) for name in self.changed() if name in _OF_DRAWS]
        if self.temperature == 0 and idle:
            yield f"note: {', '.join(idle)} has no effect at --temperature 0, which takes the most likely token"


@dataclass(frozen=True, slots=True)
class StepOptions:
    """Limits on steps and chains (tokens, except `max_steps`); None = no limit."""

    max_steps: int | None = None
    max_step_tokens: int | None = None
    min_thinking_tokens: int = 0
    max_thinking_tokens: int | None = None

    def changed(self) -> list[str]:
        """Fields that differ from their defaults."""
        return [each.name for each in fields(self) if getattr(self, each.name) != each.default]

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

        return StepLimits(**{each.name: getattr(self, each.name) for each in fields(self)})


def parsed_strategy(text: str, diagnostics: list[str]) -> Strategy:
    """The strategy `text`; for an invalid one `single`, with a message added to `diagnostics`."""
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


def place_diagnostics(device: str, precision: str) -> Iterator[str]:
    """Messages for an unknown device or precision."""
    for name, actual, known in (("--device", device, DEVICES), ("--precision", precision, PRECISIONS)):
        if actual not in known:
            yield f"{name}: got {actual}; expected one of {', '.join(known)}"


def refuse(diagnostics: Sequence[str]) -> None:
    """Raises `UserError` with all messages, if there are any."""
    if diagnostics:
        raise UserError("\n".join(diagnostics))


def _lines(error: UserError) -> list[str]:
    return str(error).splitlines()
