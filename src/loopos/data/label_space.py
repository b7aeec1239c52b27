"""Encode labels to class numbers, multi-hot lists or values, and decode them again.

The fields of a `LabelSpace` are plain values, so that a model's config can store them. Numbers in strings, as in CSV,
count as numbers. `labels.infer_task` makes the space of a data set.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeGuard

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.data.record import shown
from loopos.data.rows import Row

Task: TypeAlias = Literal["classification", "multi_label", "regression"]
Kind: TypeAlias = Literal["whole number", "number", "text", "true or false", "list"]
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
# Leading zeros make a name ("007"), not a number: two names must never become one class.
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class LabelSpace:
    """What the labels of a data set mean.

    `class_names[i]` names class i; `keys[i]` is that class as the data writes it (they differ where the config names
    the classes of whole-number labels). Both are empty for regression. `label_kind` is the kind of a label, or of the
    members of a multi-label one.
    """

    task: Task
    class_names: tuple[str, ...]
    keys: tuple[str, ...]
    label_kind: Kind
    num_outputs: int
    summary: str

    def encode(self, label: object, row: Row, column: str = "label") -> int | float | list[int]:
        """A class's number, a multi-hot list [C] of 0 and 1, or a value in the user's unit, by `task`.

        Args:
            label: as `formats.Labeled` holds it.
            row, column: the location for diagnostics.
        Raises:
            DataError: a label that the space does not hold.
        """
        if self.task == "regression":
            if kind_of(label) not in ("number", "whole number"):
                hint = f"write {label.replace(',', '.')}, with a point" if is_comma_number(label) else ""
                raise label_error(row, column, label, "a number (task: regression)", hint)
            assert isinstance(label, str | int | float)
            return float(label)
        if self.task == "classification":
            return self._index_of(sole(label), label, row, column)
        members = members_of(label)
        if members is None:
            raise label_error(row, column, label, "a list of classes (task: multi_label)")
        indices = [self._index_of(member, label, row, column) for member in members]
        if len(set(indices)) < len(indices):
            hint = "list the classes that apply; a 0 or 1 for each class in turn is not read"
            raise label_error(row, column, label, "each class once", hint)
        return [int(index in indices) for index in range(self.num_outputs)]

    def decode(self, encoded: float | Sequence[int]) -> str | int | bool | float | list[str | int | bool]:
        """The label in the user's terms: a class (a name, a whole number, true or false), a list of those, a value."""
        if self.task == "regression":
            assert isinstance(encoded, int | float)
            return float(encoded)
        if self.task == "classification":
            assert isinstance(encoded, int)
            return self._class(encoded)
        assert isinstance(encoded, Sequence)
        return [self._class(index) for index, chosen in enumerate(encoded) if chosen]

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {key: index for index, key in enumerate(self.keys)}

    def _class(self, index: int) -> str | int | bool:
        name = self.class_names[index]
        if self.class_names == self.keys and self.label_kind == "whole number":
            return int(name)
        if self.class_names == self.keys and self.label_kind == "true or false":
            return name == "true"
        return name

    def _index_of(self, member: object, label: object, row: Row, column: str) -> int:
        key = key_of(member, self.label_kind)
        if key is not None and key in self._indices:
            return self._indices[key]
        listed = ", ".join(self.keys[:12]) + (", ..." if len(self.keys) > 12 else "")
        near = difflib.get_close_matches(str(member), self.keys, n=1)
        if self.label_kind == "whole number":
            hint = f"{len(self.keys)} classes are counted from 0 to {len(self.keys) - 1}" if self.keys[0] == "0" else ""
        else:
            hint = f"did you mean {shown(near[0])}?" if near else ""
        raise label_error(row, column, label, f"one of the {len(self.keys)} classes {listed}", hint)


def label_space_of(fields: Mapping[str, Any]) -> LabelSpace:
    """The space of a model's config. Models of version 0.1 keep the summary under the name "said"."""
    known = {("summary" if name == "said" else name): value for name, value in fields.items()}
    return LabelSpace(**{**known, "class_names": tuple(known["class_names"]), "keys": tuple(known["keys"])})


def kind_of(label: object) -> Kind | None:
    """What a label is, a string by what it spells; None for what no label may be (null, an object, NaN)."""
    if isinstance(label, bool):
        return "true or false"
    if isinstance(label, int):
        return "whole number"
    if isinstance(label, list):
        return "list"
    if isinstance(label, float):
        return _number_kind(label) if math.isfinite(label) else None
    if isinstance(label, str):
        spelled = float(label) if _NUMBER.fullmatch(label) else math.nan
        return _number_kind(spelled) if math.isfinite(spelled) else "text"
    return None


def key_of(label: object, kind: Kind) -> str | None:
    """The class that a label names, in a data set whose labels are of `kind`; None if it is of another one.

    `1`, `1.0` and "1" are one class where labels are whole numbers; "1" and "1.0" are two where they are text.
    """
    if kind == "text":
        return label.strip() if isinstance(label, str) else None
    if kind_of(label) != kind:
        return None
    if isinstance(label, bool):
        return "true" if label else "false"
    assert isinstance(label, int | float | str)
    return str(label if isinstance(label, int) else int(label) if _is_digits(label) else int(float(label)))


def members_of(label: object) -> list[object] | None:
    """The classes that a multi-label row lists: a list's members, or the parts of "a|b"; None for anything else."""
    if isinstance(label, list):
        return [member.strip() if isinstance(member, str) else member for member in label]
    if isinstance(label, str):
        return [part.strip() for part in label.split("|") if part.strip()]
    return None


def sole(label: object) -> object:
    """The only member of a list of one, as annotation tools write a class; any other label as it is."""
    return members[0] if isinstance(label, list) and (members := members_of(label)) and len(members) == 1 else label


def is_comma_number(label: object) -> TypeGuard[str]:
    """Whether a label is text such as "3,5"."""
    return isinstance(label, str) and _DECIMAL_COMMA.fullmatch(label) is not None


def label_error(row: Row, column: str, label: object, expected: str, hint: str = "") -> DataError:
    """The error of one label, with its row's location."""
    return DataError([Diagnostic(row.source_label, row.line, None, column, shown(label), expected, hint)])


def _number_kind(value: float) -> Kind:
    return "whole number" if value.is_integer() else "number"


def _is_digits(label: str | float) -> bool:
    # A float of more than 53 bits would round a long number, and so merge classes.
    return isinstance(label, str) and label.lstrip("+-").isdigit()
