"""The description of a trained model (`loopos.json`), which is checked before use. Unknown keys of other versions are
ignored. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from loopos.config.diagnostics import UserError
from loopos.config.extras import install_command
from loopos.config.keys import Pooling
from loopos.config.paths import HEAD_FILE, MODEL_DESCRIPTION
from loopos.config.preferences import REWARD_TASK, Aggregation
from loopos.storage.json_files import read_object
from loopos.storage.manifest import check_manifest

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


_LABEL_SPACE = {"task", "class_names", "keys", "label_kind", "num_outputs"}


def _label_space(value: Any) -> bool:
    texts = _list_of(_text)
    return (
        isinstance(value, dict)
        and set(value) in (_LABEL_SPACE | {"summary"}, _LABEL_SPACE | {"said"})
        and texts(value["class_names"])
        and texts(value["keys"])
        and _count(value["num_outputs"])
        and all(isinstance(value[key], str) for key in set(value) - {"class_names", "keys", "num_outputs"})
    )


def _step_format(value: Any) -> bool:
    keys = {"opening", "closing", "delimiter", "answer_marker"}
    return isinstance(value, dict) and set(value) <= keys and all(isinstance(each, str) for each in value.values())


def _process(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"step_separator", "aggregation", "step_format", "answer_is_step"}
        and _text(value["step_separator"])
        and value["aggregation"] in get_args(Aggregation)
        and _or_none(_step_format)(value["step_format"])
        and isinstance(value["answer_is_step"], bool)
    )


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
# Kind of model → key → (whether a value is valid, description of valid values).
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
    "process": (_or_none(_process), "step_separator, aggregation, step_format and answer_is_step"),
    "base": (_or_none(_text), "a text"),
    "pretrained_weights": (_or_none(_text), "a text"),
}


def check_description(file: Path, description: Mapping[str, Any], kind: str) -> None:
    """Raises `UserError` with the keys that are missing or have invalid values. kind: of the model, also
    "language_ensemble".
    """
    wrong = list(_diagnostics(description, _NEEDED[kind]))
    if wrong:
        raise UserError(
            "\n".join([*(f"{file}: {diagnostic}" for diagnostic in wrong[:3]), "restore it, or save the model again"])
        )


def _diagnostics(description: Mapping[str, Any], needed: Mapping[str, tuple[Fits, str]]) -> Iterator[str]:
    for key, (fits, expected) in {**_OPTIONAL, **needed}.items():
        if key not in description:
            if key in needed:
                yield f"{key}: missing; expected {expected}"
        elif not fits(description[key]):
            text = json.dumps(description[key], ensure_ascii=False)
            yield f"{key}: expected {expected}, got {text if len(text) <= 60 else f'{text[:57]}...'}"


FORMAT = 1
_CHECKPOINT = re.compile(r"step-\d{8,}")
ENSEMBLE = "ensemble"
"""The description's key for the members of an ensemble."""
LANGUAGE_ENSEMBLE = "language_ensemble"
"""That of an ensemble of language models."""
Kind: TypeAlias = Literal["language", "head", "reward", "ensemble"]
"""A language model; a model with a head that predicts labels or values; a reward model; several with a head as one."""


def refuse_checkpoint(path: Path) -> None:
    """Raises `UserError` for a checkpoint folder, which contains the state for resuming but no model."""
    steps = [path] if _CHECKPOINT.fullmatch(path.name) else sorted(path.glob("step-*"))
    if not steps or not (steps[-1] / "manifest.json").is_file():
        return
    step = int(steps[-1].name.removeprefix("step-"))
    raise UserError(
        f"{path}: a checkpoint holds weights and optimizer for --resume, not a model; to get the model of the newest "
        f"checkpoint, end its run there: loopos train CONFIG --resume training.max_steps={step}"
    )


def read_description(folder: Path) -> dict[str, Any]:
    """The description of a trained model's folder. Raises `UserError` if it is broken, of another version, or
    changed.
    """
    file = folder / MODEL_DESCRIPTION
    check_manifest(folder, of=lambda name: name == MODEL_DESCRIPTION)
    description = read_object(file, advice="make it again: loopos train CONFIG --resume")
    if description.get("format") != FORMAT:
        raise UserError(
            f"{file}: format {description.get('format')}, this LoopOS reads {FORMAT}: written by another version; "
            f"upgrade loopos: {install_command()}"
        )
    kind: str = LANGUAGE_ENSEMBLE if LANGUAGE_ENSEMBLE in description else kind_of(description)
    # A head file marks a model with a head, even if the description lacks the key.
    check_description(file, description, "head" if kind == "language" and (folder / HEAD_FILE).is_file() else kind)
    return description


def kind_of(description: Mapping[str, Any]) -> Kind:
    """The kind of model that a description belongs to. Models that LoopOS did not write count as language models."""
    if ENSEMBLE in description:
        return "ensemble"
    if description.get("task") == REWARD_TASK:
        return "reward"
    return "head" if "pooling" in description else "language"
