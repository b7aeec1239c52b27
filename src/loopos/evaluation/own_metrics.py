"""Metrics of a Python program: functions of predictions and targets, added to LoopOS's own metrics.

`docs/post_training.md` describes predictions and targets for each method. One process computes the metrics for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsFloat, TypeAlias

import numpy

from loopos.config.diagnostics import UserError
from loopos.config.own_function import OwnFunction
from loopos.data.record import shown
from loopos.evaluation.metrics import METRIC_DIRECTION, METRIC_MEANING
from loopos.evaluation.policy_metrics import POLICY_METRIC_DIRECTION
from loopos.evaluation.preference_metrics import PREFERENCE_METRIC_DIRECTION
from loopos.evaluation.run_outcome import FLAGS
from loopos.evaluation.step_metrics import STEP_METRIC_DIRECTION

Direction: TypeAlias = Literal["min", "max"]
MetricFunction: TypeAlias = Callable[[Any, Any], SupportsFloat]
MetricFunctions: TypeAlias = Mapping[str, MetricFunction | tuple[MetricFunction, Direction]]
"""Name → function, or (function, "min") if lower is better."""

_OURS = {
    *METRIC_DIRECTION,
    *METRIC_MEANING,
    *PREFERENCE_METRIC_DIRECTION,
    *STEP_METRIC_DIRECTION,
    *POLICY_METRIC_DIRECTION,
}
_EXPECTED = 'a function of (predictions, targets), or a pair of it and "min" or "max"'


@dataclass(frozen=True)
class OwnMetrics:
    """Functions and directions by name."""

    functions: Mapping[str, OwnFunction] = field(default_factory=dict)
    directions: Mapping[str, Direction] = field(default_factory=dict)

    @classmethod
    def of(cls, actual: MetricFunctions) -> OwnMetrics:
        """Raises `UserError` for invalid entries."""
        functions: dict[str, OwnFunction] = {}
        directions: dict[str, Direction] = {}
        for name, value in actual.items():
            parts: tuple[Any, ...] = value if isinstance(value, tuple) else (value, "max")
            if not isinstance(name, str) or not name or name in FLAGS:
                raise UserError(f"metrics: got the name {shown(name)}; expected a name for a metric of your own")
            if name in _OURS:
                raise UserError(f'metrics: got the name "{name}", which is a metric of LoopOS; choose another name')
            if len(parts) != 2 or not callable(parts[0]) or parts[1] not in ("min", "max"):
                raise UserError(f"metrics[{name!r}]: got {value!r:.80}; expected {_EXPECTED}")
            functions[name] = OwnFunction(f"metrics[{name!r}] ({name_of(parts[0])})", parts[0])
            directions[name] = parts[1]
        return cls(functions, directions)

    def __bool__(self) -> bool:
        return bool(self.functions)

    def direction(self, name: str, known: Mapping[str, Direction]) -> Direction:
        """The direction of a metric: one of these, or of `known`. Raises `UserError` for any other."""
        found = self.directions.get(name) or known.get(name)
        if found is None:
            raise UserError(f'training.metric: got "{name}"; expected one of {", ".join([*known, *self.directions])}')
        return found

    def added(
        self,
        metrics: Mapping[str, float],
        predictions: Any,
        targets: Any,
        *,
        is_first: bool,
        gather: Callable[[object], list[object]],
    ) -> dict[str, float]:
        """`metrics` and those of the functions, the same on every rank; non-finite values are omitted. is_first: this
        rank computes them. Raises `UserError` with the function's name, for what it raises and for a result that is no
        number.
        """
        if not self.functions:
            return dict(metrics)
        own = {name: self._value(name, metrics, predictions, targets) for name in self.functions} if is_first else {}
        found = gather(own)[0]
        assert isinstance(found, dict), "the first rank's"
        return {**metrics, **{name: value for name, value in found.items() if math.isfinite(value)}}

    def _value(self, name: str, metrics: Mapping[str, float], predictions: Any, targets: Any) -> float:
        function = self.functions[name]
        if name in metrics:
            raise function.error("LoopOS measures a metric of this name; choose another name")
        about = f"the validation rows: {_described(predictions)} and {_described(targets)}"
        returned = function(_copied(predictions), _copied(targets), about=about)
        value = returned.item() if hasattr(returned, "item") and getattr(returned, "size", None) == 1 else returned
        if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
            raise function.error(f"returned {type(returned).__name__} {returned!r:.80}; expected a number")
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as problem:
            sentence = f"returned {type(returned).__name__} {returned!r:.80}; expected one number"
            raise function.error(sentence) from problem


def name_of(function: object) -> str:
    """The name of a function in its code."""
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


def _copied(values: Any) -> Any:
    """A copy, so that a function cannot change the original."""
    return numpy.array(values) if isinstance(values, numpy.ndarray) else list(values)


def _described(values: Any) -> str:
    if isinstance(values, numpy.ndarray):
        return f"an array of shape {values.shape}"
    return f"a list of {len(values)}"
