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
class SamplingFields:
    """What a user chooses, with defaults that leave the distribution unchanged, and help texts; the values are not
    checked. The options of commands and the requests of the server are drawn from these fields.
    """

    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0: greedy decoding."})
    top_k: int = field(default=0, metadata={"help": "Sample from the k most likely tokens; 0: all tokens."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the smallest set of top tokens with this probability."}
    )
    min_p: float = field(
        default=0.0, metadata={"help": "Drop tokens below this fraction of the top token's probability."}
    )
    typical_p: float = field(default=1.0, metadata={"help": "Locally typical sampling: probability mass to keep."})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Penalizes tokens that already occur; 1 turns it off."}
    )
    presence_penalty: float = field(
        default=0.0, metadata={"help": "Subtracted once from the logits of tokens that already occur."}
    )
    frequency_penalty: float = field(
        default=0.0, metadata={"help": "Subtracted from a token's logit for each occurrence."}
    )
    no_repeat_ngram: int = field(default=0, metadata={"help": "Never repeat an n-gram of this size; 0: off."})
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum new tokens per completion."})
    stop: tuple[str, ...] = field(
        default=(), metadata={"help": "Text that ends a completion; repeatable.", "metavar": "TEXT"}
    )
    seed: int = field(default=0, metadata={"help": "Random seed."})

    def out_of_range(self) -> list[tuple[str, str]]:
        """The fields whose values are out of range, each with what was given and what is expected."""
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
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("stop", all(self.stop), "strings of at least one character"),
        )
        return [
            (name, f"got {getattr(self, name)!r}; expected {expected}") for name, holds, expected in ranges if not holds
        ]


@dataclass(frozen=True, kw_only=True)
class SamplingParams(SamplingFields):
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
        json_schema: JSON Schema, as JSON text, that the completion follows; None is off.
        seed: Fixes every draw, together with the prompt.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    keep_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop_at_end: bool = True
    json_schema: str | None = None

    def __post_init__(self) -> None:
        """Raises `UserError` with every setting that is out of range."""
        # A text alone would stop at each of its characters, and a list has no hash.
        actual: object = self.stop
        object.__setattr__(self, "stop", (actual,) if isinstance(actual, str) else tuple(self.stop))
        wrong = [f"{name}: {problem}" for name, problem in self.out_of_range()]
        if any(token < 0 for token in self.logit_bias):
            wrong.append(f"logit_bias: got {self.logit_bias!r}; expected token ids of 0 or more")
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
        return self.needs_history or bool(self.logit_bias) or self.constrained or (filters and not self.greedy)

    @property
    def constrained(self) -> bool:
        """Whether a grammar forbids tokens."""
        return self.json_schema is not None

    def of_choice(self) -> SamplingParams:
        """The settings that one token's choice depends on: equal for rows that may be sampled together. Rows of unlike
        schemas may: each has a grammar of its own.
        """
        schema = "" if self.constrained else None
        plain = replace(self, max_new_tokens=1, stop=(), keep_stop=False, stop_token_ids=(), stop_at_end=True, seed=0)
        return replace(plain, json_schema=schema)


def _is_temperature(value: float) -> bool:
    return value == 0 or LEAST_DIVISOR <= value < math.inf
