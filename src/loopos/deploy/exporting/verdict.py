"""What a check of an export found, and whether the export may be shipped.

Enters: outputs and texts of the model and of its export. Leaves: a `Check`; a refusal of an exact export that differs,
or the warning of a lossy one. Left out: opening either (`reopened.py`, `language_check.py`, `task_check.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from loopos.config.faults import UserError

LEAST_SAME: Mapping[str, float] = {"q8_0": 0.9, "q4_0": 0.8}
"""Lossy number format → the least share of places where the export's likeliest token is the model's."""
UNLIKE_EXIT_CODE = 6
"""Of a lossy export below that share, which is written all the same."""
# Two runs of the same numbers in fp32 differ by less than a tenth of this share of the largest output.
_ROUNDING = 1e-4


class ExportDiffers(UserError):
    """An export in an exact number format that is not the model that it was made from."""

    exit_code: int = 1


@dataclass(frozen=True)
class Check:
    """largest: the largest difference of the outputs (logits, or hidden states of an encoder). scale: the largest
    output of the original. same: the share of places where the likeliest token or class is the same.

    beyond: the largest difference from the original after its weights were rounded to the export's number format: what
    the format does not explain. None where that was not looked at. texts: what was found of greedy text, a program
    each. faults: what no rounding explains.
    """

    largest: float
    scale: float
    same: float
    beyond: float | None = None
    texts: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    def said(self) -> str:
        outputs = (
            f"outputs differ by at most {self.largest:.3g} (largest output {self.scale:.3g}); same top prediction at "
            f"{self.same:.1%} of positions"
        )
        return "; ".join([outputs, *self.texts])


def compared(
    original: Tensor | Sequence[Tensor],
    again: Tensor | Sequence[Tensor],
    rounded: Tensor | Sequence[Tensor] | None = None,
    *,
    tolerance: float = _ROUNDING,
) -> Check:
    """Outputs `[..., C]` of the original, of the export, and of the original with rounded weights; or several of each,
    in one order. tolerance: the share of the largest output that arithmetic explains.
    """
    first, second = _several(original), _several(again)
    third = first if rounded is original else [] if rounded is None else _several(rounded)
    scale = max(float(each.abs().max()) for each in first)
    likeliest = [
        (one.argmax(-1) == other.argmax(-1)).double().flatten() for one, other in zip(first, second, strict=True)
    ]
    same = sum(float(each.sum()) for each in likeliest) / sum(len(each) for each in likeliest)
    largest = _largest(first, second)
    beyond = _largest(third, second) if third else None
    faults = []
    if beyond is not None and not beyond <= tolerance * scale:
        faults.append(
            f"outputs differ by up to {beyond:.3g}; expected at most {tolerance * scale:.2g}, since the "
            "same weights were rounded alike"
        )
    return Check(largest, scale, same, beyond, faults=tuple(faults))


def _several(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs


def _largest(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))


def judge(check: Check, type_name: str, place: str) -> str:
    """The warning about an export, empty where there is none. type_name: its number format. Raises `ExportDiffers` for
    an exact format whose outputs or texts differ by more than its rounding.
    """
    least = LEAST_SAME.get(type_name)
    if least is None:
        if check.faults:
            raise ExportDiffers(
                f"{place}: the export is another model than the one it was made from:\n"
                + "".join(f"  {fault}\n" for fault in check.faults)
                + "nothing was written"
            )
        return ""
    if check.same < least:
        return (
            f"{type_name} says other things than the model: the likeliest token is the same in {check.same:.1%} of "
            f"places, expected at least {least:.0%}; take a wider --type: q8_0, f16 or bf16"
        )
    return ""
