"""What a user's own function returns, converted to numbers; `config.own_function` finds and calls it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from decimal import Decimal
from numbers import Real

from loopos.config.own_function import OwnFunction
from loopos.data.record import shown

LARGEST = 1e18
"""The largest accepted size of a number: its square must fit into fp32."""


def number_of(value: object) -> float | None:
    """A number of Python, NumPy or torch (also an array or a tensor of one element) as a float; None for anything else,
    for NaN, for an infinity, and for one larger than `LARGEST`.
    """
    value = plain(value)
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Real | Decimal):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) <= LARGEST else None


def numbers_of(returned: object, locations: Sequence[str], function: OwnFunction) -> list[float | None]:
    """One number, or None, for each of `locations`, which describe the responses in messages. Raises `UserError`."""
    count, found = len(locations), plain(returned)
    expected = f"expected one number per response, here a list of {count}"
    if found is None:
        raise function.error(f"returned None; {expected} (is a return missing?)")
    if isinstance(found, Real | Decimal):
        raise function.error(f"returned a single number, {returned}; {expected}")
    if isinstance(found, str | bytes | Mapping | Set) or not isinstance(found, Iterable):
        raise function.error(f"returned {shown(returned)} ({type(returned).__name__}); {expected}")
    values = list(found)
    if len(values) != count:
        raise function.error(f"returned {len(values)} numbers for {count} responses; {expected}")
    numbers: list[float | None] = []
    for value, location in zip(values, locations, strict=True):
        number = number_of(value)
        if number is None and value is not None:
            raise function.error(
                f"returned {_short(value)}; expected a finite number of at most {LARGEST:g} in size, or None"
                f"\n    for {location}"
            )
        numbers.append(number)
    return numbers


def called_for(prompt: str, source: str = "") -> str:
    """A prompt and its source, for a message."""
    text = f"the prompt {shown(prompt)}"
    return f"{source}, {text}" if source else text


def plain(value: object) -> object:
    """Numbers, arrays and tensors of NumPy and torch as Python values."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def _short(value: object) -> str:
    converted = plain(value)
    return str(converted) if isinstance(converted, Real | Decimal) else shown(converted)
