"""What a key of a config may be: the types of values, by their unit, and what all sections share.

Enters: plain values. Leaves: checked ones; pydantic's errors rise and `wording` puts them into words. Types are strict:
a whole number is not taken from true, "16" or 16.0. Left out: the keys themselves (`sections.py`).

How an answer is made of chains of reasoning: the names that configs and the command line give.

Enters: one word such as "self_consistency:8". Leaves: a `Strategy`. Left out: the strategies themselves
(`generation.search`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)

from loopos.config.paths import expanded

Task: TypeAlias = Literal["classification", "multi_label", "regression"]
Pooling: TypeAlias = Literal["auto", "mean", "last", "first", "max"]
TargetScaling: TypeAlias = Literal["auto", "standardize", "scale", "none"]
Optimizer: TypeAlias = Literal["sgd", "adam", "adamw", "adafactor", "muon"]
Schedule: TypeAlias = Literal[
    "constant", "linear", "cosine", "cosine_restarts", "warmup_stable_decay", "plateau", "inverse_sqrt"
]
Precision: TypeAlias = Literal["auto", "fp32", "bf16", "fp16"]
Trainable: TypeAlias = Literal["all", "head", "lora"]
Role: TypeAlias = Literal["text", "text_pair", "label"]
BuiltInMetric: TypeAlias = Literal[
    "loss",
    "accuracy",
    "macro_f1",
    "micro_f1",
    "auroc",
    "log_loss",
    "ece",
    "subset_accuracy",
    "mae",
    "rmse",
    "r2",
    "pearson",
    "spearman",
]


OWN_METRICS = "own_metrics"
"""Key of the context of validation: the names of the metrics that a Python program brings along."""


def _or_own(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """The name of such a metric as it is; anything else for the type to judge."""
    own = (info.context or {}).get(OWN_METRICS, ())
    return value if isinstance(value, str) and value in own else handler(value)


MAY_BE_OWN = WrapValidator(_or_own)
AS_IT_IS = PlainSerializer(lambda value: value)
"""A name outside the literals is written without a warning."""

Metric: TypeAlias = Annotated[BuiltInMetric, MAY_BE_OWN, AS_IT_IS]

BUILT_IN_METRICS: frozenset[str] = frozenset(get_args(BuiltInMetric))

METRICS: dict[Task, tuple[BuiltInMetric, ...]] = {
    "classification": ("loss", "accuracy", "macro_f1", "micro_f1", "auroc", "log_loss", "ece"),
    "multi_label": ("loss", "subset_accuracy", "macro_f1", "micro_f1", "auroc", "log_loss"),
    "regression": ("loss", "mae", "rmse", "r2", "pearson", "spearman"),
}
"""The metrics of each task."""

ALSO_UNDER_DATA = ("shuffle", "num_workers", "prefetch_batches", "max_length")
"""Keys of `training` that the guide's configs have under `data`; taken there too."""

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(value: object) -> object:
    """ "90s", "30m" and "2h" as seconds; anything else as it is, for the type to judge."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    return float(match.group(1)) * _SECONDS[match.group(2)] if match else value


def _warmup(value: object) -> object:
    """Whole steps as int, a share as float; 1.0 and 10.0 would be either, and are refused."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or (isinstance(value, float) and value != 0 and not 0 < value < 1):
        raise ValueError("neither steps nor a share")
    return value


Count: TypeAlias = Annotated[int, Field(ge=1)]
Share: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
ClassWeights: TypeAlias = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
Duration: TypeAlias = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(_seconds),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": f"^{_DURATION.pattern}$", "examples": ["90s", "30m", "2h"]},
            ]
        }
    ),
]
Warmup: TypeAlias = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)],
    BeforeValidator(_warmup),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}]}
    ),
]


Place: TypeAlias = Annotated[Text, AfterValidator(expanded)]
"""What may be a path: "~" is the home folder, as in a shell."""


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, strict types, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


STRATEGY = re.compile(r"single|(self_consistency|best_of_n):([1-9][0-9]*)|step_beam:([1-9][0-9]*)x([1-9][0-9]*)")
EXAMPLES = ("single", "self_consistency:8", "best_of_n:4", "step_beam:2x4")


@dataclass(frozen=True, slots=True)
class Strategy:
    """`chains`: sampled for each problem (single: 1); of a step beam search `beams` go on, each with `candidates`."""

    kind: Literal["single", "self_consistency", "best_of_n", "step_beam"] = "single"
    chains: int = 1
    beams: int = 1
    candidates: int = 1

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """The strategy of a name. Raises ValueError for another form."""
        found = STRATEGY.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no strategy; expected one like {', '.join(EXAMPLES)}")
        kind, samples, beams, candidates = found.groups()
        if beams:
            return cls("step_beam", int(beams) * int(candidates), int(beams), int(candidates))
        if samples:
            return cls("best_of_n" if kind == "best_of_n" else "self_consistency", int(samples))
        return cls()
