"""A model's loopos.json, checked before anything is made of it.

Enters: the description and its kind. Leaves: nothing, or an error with every key that is missing or of another kind.
Keys that another version adds are let through. Left out: the folder's manifest (`storage.manifest`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_args

from loopos.config.faults import UserError
from loopos.config.keys import Pooling

Fits: TypeAlias = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _token(value: Any) -> bool:
    return type(value) is int and value >= 0


def _list_of(fits: Fits) -> Fits:
    return lambda value: isinstance(value, list) and all(fits(each) for each in value)


def _or_none(fits: Fits) -> Fits:
    return lambda value: value is None or fits(value)


def _one_of(*values: str) -> Fits:
    return lambda value: isinstance(value, str) and value in values


def _label_space(value: Any) -> bool:
    texts = _list_of(_text)
    return (
        isinstance(value, dict)
        and set(value) == {"task", "class_names", "keys", "label_kind", "num_outputs", "said"}
        and texts(value["class_names"])
        and texts(value["keys"])
        and _count(value["num_outputs"])
        and all(isinstance(value[key], str) for key in ("task", "label_kind", "said"))
    )


def _step_format(value: Any) -> bool:
    keys = {"opening", "closing", "delimiter", "answer_marker"}
    return isinstance(value, dict) and set(value) <= keys and all(isinstance(each, str) for each in value.values())


def _ensemble(member: Fits) -> Fits:
    def fits(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and isinstance(value.get("method"), str)
            and _list_of(member)(value.get("members"))
            and _list_of(_number)(value.get("weights"))
        )

    return fits


def _member(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(value.get(key), str) for key in ("name", "path"))


_MEMBERS = "a method, members, and a weight each"
_PRECISION = (_one_of("bf16", "fp16", "fp32"), "bf16, fp16 or fp32")
_TASKS = ("classification", "multi_label", "regression")
_POOLINGS: tuple[str, ...] = get_args(Pooling)
_NUMBERS = (_list_of(_number), "a list of numbers")
_NAMES = (_list_of(_text), "a list of texts")
_TASK = (_one_of(*_TASKS), f"one of {', '.join(_TASKS)}")
_LABELS = {
    "task": _TASK,
    "class_names": _NAMES,
    "label_space": (_label_space, "the labels as training wrote them"),
    "threshold": (_number, "a number"),
}
_OF_HEADS = {
    "pooling": (_one_of(*_POOLINGS), f"one of {', '.join(_POOLINGS)}"),
    "max_length": (_count, "a whole number from 1"),
    "precision": _PRECISION,
}
# Kind of model → key → whether a value will do, and what will.
_NEEDED: Mapping[str, Mapping[str, tuple[Fits, str]]] = {
    "language": {"precision": _PRECISION, "stop_tokens": (_list_of(_token), "a list of token ids")},
    "head": {
        **_OF_HEADS,
        **_LABELS,
        "target_mean": (_number, "a number"),
        "target_std": (_number, "a number"),
    },
    "reward": {
        **_OF_HEADS,
        "class_names": _NAMES,
        "score_mean": _NUMBERS,
        "score_std": _NUMBERS,
        "text": (lambda value: isinstance(value, bool), "true or false"),
    },
    "ensemble": {**_LABELS, "ensemble": (_ensemble(_text), _MEMBERS)},
    "language_ensemble": {"language_ensemble": (_ensemble(_member), _MEMBERS)},
}
_OPTIONAL: Mapping[str, tuple[Fits, str]] = {
    "step_format": (_or_none(_step_format), "texts named opening, closing, delimiter and answer_marker"),
    "base": (_or_none(_text), "a text"),
    "pretrained_weights": (_or_none(_text), "a text"),
}


def check_description(file: Path, description: Mapping[str, Any], kind: str) -> None:
    """Raises `UserError` with the keys that are missing or of another kind. kind: of the model, "language_ensemble"
    too.
    """
    wrong = list(_faults(description, _NEEDED[kind]))
    if wrong:
        raise UserError(
            "\n".join([*(f"{file}: {fault}" for fault in wrong[:3]), "restore it, or save the model again"])
        )


def _faults(description: Mapping[str, Any], needed: Mapping[str, tuple[Fits, str]]) -> Iterator[str]:
    for key, (fits, expected) in {**_OPTIONAL, **needed}.items():
        if key not in description:
            if key in needed:
                yield f"{key}: missing; expected {expected}"
        elif not fits(description[key]):
            text = json.dumps(description[key], ensure_ascii=False)
            yield f"{key}: expected {expected}, got {text if len(text) <= 60 else f'{text[:57]}...'}"
