"""Types of config values by unit, what all sections share, and the strategies of answer selection.

Types are strict: a whole number is not accepted as true, "16" or 16.0. pydantic's errors are raised here; `wording`
turns them into messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function

from loopos.config.paths import expanded
from loopos.config.registry import OF_YOUR_OWN, Registry

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
"""Key of the validation context: the names of metrics that a Python program adds."""


def _or_own(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """Accept the name of an added metric; leave any other value to the type."""
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

ALSO_UNDER_DATA = ("shuffle", "max_length")
"""Keys of `training` that are also accepted under `data`."""

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(value: object) -> object:
    """Convert "90s", "30m" and "2h" to seconds; leave any other value to the type."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    return float(match.group(1)) * _SECONDS[match.group(2)] if match else value


def _warmup(value: object) -> object:
    """Whole steps as int, a fraction as float; 1.0 and 10.0 are ambiguous and refused."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or (isinstance(value, float) and value != 0 and not 0 < value < 1):
        raise ValueError("neither steps nor a fraction")
    return value


AboveZero: TypeAlias = Annotated[float, Field(gt=0)]
ZeroOrMore: TypeAlias = Annotated[float, Field(ge=0)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
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


MISSING_VARIANT = "missing_variant"
"""The type of the error for "module:name" that names nothing; its message is the reason."""
_OWN_NAME = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


@dataclass(frozen=True, slots=True)
class VariantName:
    """An annotation of a text: the name of a variant in `registry`, or "module:name" of one of the user's own. only:
    whether a variant may be named here; all may when absent. imports: whether one of the user's own is imported when
    the config is read, because other keys depend on it or because a run would name it late.
    """

    registry: Registry[Any]
    only: Callable[[Any], bool] | None = None
    imports: bool = True

    def names(self) -> list[str]:
        """The names that are allowed, with those of installed packages."""
        return [name for name in self.registry if self.only is None or self.only(self.registry[name])]

    def _checked(self, name: str) -> str:
        if ":" in name:
            if re.fullmatch(_OWN_NAME, name) is None:
                raise ValueError("not module:name")
            why = self.registry.why_missing(name) if self.imports else ""
            if why:
                raise PydanticCustomError(MISSING_VARIANT, "{why}", {"why": why})
        elif name not in self.registry or (self.only is not None and not self.only(self.registry[name])):
            raise ValueError("unknown")
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        own = {"type": "string", "pattern": f"^{_OWN_NAME}$", "$comment": OF_YOUR_OWN}
        names = self.names()
        return {"anyOf": [{"enum": names}, own]} if names else own


Location: TypeAlias = Annotated[Text, AfterValidator(expanded)]
"""A path, hub id or built-in name; a leading "~" is the home folder, as in a shell."""


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, strict types, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


def section_class(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, also where it may be null."""
    for each in (field.annotation, *get_args(field.annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


STRATEGY = re.compile(r"single|(self_consistency|best_of_n):([1-9][0-9]*)|step_beam:([1-9][0-9]*)x([1-9][0-9]*)")
EXAMPLES = ("single", "self_consistency:8", "best_of_n:4", "step_beam:2x4")


RANKED = ("best_of_n", "step_beam")
"""The kinds of strategies whose chains a reward model may rank."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """How an answer is selected: `chains` sampled per problem, or a step beam search of `beams` × `candidates`."""

    kind: Literal["single", "self_consistency", "best_of_n", "step_beam"] = "single"
    chains: int = 1
    beams: int = 1
    candidates: int = 1

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Parse a name such as "self_consistency:8". Raises ValueError for any other form."""
        found = STRATEGY.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not a strategy; expected for example {', '.join(EXAMPLES)}")
        kind, samples, beams, candidates = found.groups()
        if beams:
            return cls("step_beam", int(beams) * int(candidates), int(beams), int(candidates))
        if samples:
            return cls("best_of_n" if kind == "best_of_n" else "self_consistency", int(samples))
        return cls()
