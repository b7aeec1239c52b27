"""The recipe of a quantization: its keys, and what they must not contradict.

Enters: a recipe file, words of the command line, or both. Leaves: a `QuantizationRecipe`, or every fault at once. Left
out: what only the weights can tell (which layers there are, whether a group divides their inputs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from pydantic import Field

from loopos.config.faults import Finding
from loopos.config.keys import Place, Text
from loopos.config.recipe import Recipe, check_text, read

Method: TypeAlias = Literal["int8", "int8-dynamic", "int4"]
Calibration: TypeAlias = Literal["none", "gptq", "awq"]


class QuantizationRecipe(Recipe):
    """Everything that a quantization is told."""

    method: Method = Field(description="format of the linear layers' weights, and whether activations are rounded too")
    group_size: Literal[32, 64, 128, 256] | None = Field(
        default=None, description="int4: inputs that share a scale; 32 when absent"
    )
    calibration: Calibration = Field(
        default="none", description="how weights are rounded: to the nearest code, or by what the layers read of a text"
    )
    calibration_text: Place | None = Field(
        default=None, description="gptq, awq: file of text or rows that the model reads"
    )
    keep: list[Text] = Field(
        default=[], description="patterns of layers that stay as they are; * stands for any letters"
    )

    @property
    def bits(self) -> int:
        """Bits of a weight of the linear layers."""
        return 4 if self.method == "int4" else 8

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None where all of a row do."""
        return (self.group_size or 32) if self.method == "int4" else None

    @property
    def needs_calibration(self) -> bool:
        """Whether the model reads text."""
        return self.calibration != "none"

    def check(self) -> Iterator[Finding]:
        """Contradictions between keys, and files that are not there."""
        if self.group_size is not None and self.method != "int4":
            given = f"{self.group_size} with method {self.method}"
            yield Finding(("group_size", "method"), given, "no group size: int8 has one scale a row; or method int4")
        if self.needs_calibration and self.calibration_text is None:
            yield Finding(
                ("calibration_text", "calibration"),
                f"nothing with calibration {self.calibration}",
                "a file of text or rows",
                "the text should be like that which the model will meet",
            )
        if self.calibration_text is not None and not self.needs_calibration:
            yield Finding(("calibration_text", "calibration"), "a text that nobody reads", "calibration gptq or awq")
        yield from check_text("calibration_text", self.calibration_text)
        yield from super().check()


def read_recipe(path: str | None, overrides: Sequence[str]) -> QuantizationRecipe:
    """The recipe in a file, if one is named, with `key=value` words that win over it. Raises `ConfigError` with every
    fault.
    """
    return read(QuantizationRecipe, path, overrides)
