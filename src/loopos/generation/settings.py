"""How tokens are sampled and when a completion ends: one validated, frozen record per prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loopos.config.diagnostics import UserError

# Smaller divisors and larger penalties overflow fp32.
LEAST_DIVISOR = 1e-6
MOST_PENALTY = 1e6


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are sampled, and when a text ends. All defaults leave the model's distribution unchanged.

    Raises `UserError` that names every value out of its range.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        top_k: Only the k most likely tokens; 0 is all.
        top_p: Only the fewest tokens whose probability reaches p.
        min_p: Only tokens at least `min_p` times as likely as the most likely.
        typical_p: Only tokens of typical surprisal whose probability reaches p.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in the prompt or completion.
        presence_penalty: Subtracted from the logits of tokens that are in the completion.
        frequency_penalty: Subtracted for each occurrence in the completion.
        no_repeat_ngram: No n-gram occurs twice, prompt included; 0 is off.
        logit_bias: Token id → what is added to its logit.
        max_new_tokens: Most tokens of a completion.
        stop: Texts that end it.
        keep_stop: Whether such a text stays in the completion.
        stop_token_ids: Tokens that end it.
        stop_at_end: Whether the model's own end tokens end it too.
        seed: Fixes every draw, together with the prompt.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop_at_end: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `UserError` with every setting that is out of range."""
        # A text alone would stop at each of its characters, and a list has no hash.
        given: object = self.stop
        object.__setattr__(self, "stop", (given,) if isinstance(given, str) else tuple(self.stop))
        ranges = (
            ("temperature", _is_temperature(self.temperature), f"0 (greedy), or {LEAST_DIVISOR:g} or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("typical_p", 0 < self.typical_p <= 1, "above 0, at most 1 (off)"),
            (
                "repetition_penalty",
                LEAST_DIVISOR <= self.repetition_penalty <= 1 / LEAST_DIVISOR,
                f"{LEAST_DIVISOR:g} to {1 / LEAST_DIVISOR:g}; 1 is off",
            ),
            ("presence_penalty", abs(self.presence_penalty) <= MOST_PENALTY, f"at most {MOST_PENALTY:g} in size"),
            ("frequency_penalty", abs(self.frequency_penalty) <= MOST_PENALTY, f"at most {MOST_PENALTY:g} in size"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 (off) or more"),
            ("logit_bias", all(token >= 0 for token in self.logit_bias), "token ids of 0 or more"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("stop", all(self.stop), "strings of at least one character"),
        )
        wrong = [
            f"{name}: got {getattr(self, name)!r}; expected {expected}" for name, holds, expected in ranges if not holds
        ]
        if wrong:
            raise UserError("\n".join(wrong))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def needs_history(self) -> bool:
        """Whether the choice depends on earlier tokens beyond the logits."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.no_repeat_ngram)
        return self.repetition_penalty != 1 or any(penalties)

    @property
    def shaped(self) -> bool:
        """Whether anything except the temperature changes the distribution."""
        filters = self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1
        return self.needs_history or bool(self.logit_bias) or (filters and not self.greedy)

    def of_choice(self) -> SamplingParams:
        """The settings that one token's choice depends on: equal for rows that may be sampled together."""
        return replace(self, max_new_tokens=1, stop=(), keep_stop=False, stop_token_ids=(), stop_at_end=True, seed=0)


def _is_temperature(value: float) -> bool:
    return value == 0 or LEAST_DIVISOR <= value < math.inf
