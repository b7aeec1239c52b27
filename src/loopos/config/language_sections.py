"""Sections of a config that methods for language models share: the model without a head, the optimizer's defaults, and
where texts come from.

Enters: plain values. Leaves: frozen sections. Left out: what no single key can tell (`checks`, and each method's own
module).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from loopos.config.keys import Count, Optimizer, Place, Share, Text
from loopos.config.sections import ReadingSection, SizesSection, TrainingSection

LANGUAGE_METRICS = ("loss", "accuracy")
"""What a language model in training can be judged by: the loss of the trained tokens (nats), and, where answers are
generated, the share of them that is right."""


class LanguageModelSection(SizesSection):
    """The model's sizes (needed for new weights and bare files alone)."""

    attention: Literal["auto", "packed", "padded"] = Field(default="auto", description="how sequences share a batch")


class LanguageTrainingSection(TrainingSection):
    """The optimizer, its schedule, what trains, and when to validate, save and stop; AdamW unless told otherwise."""

    optimizer: Optimizer = Field(default="adamw", description="rule of the weight updates")


class TextSourceSection(ReadingSection):
    """How rows of text are read, and where the run goes."""

    validation_data: Place | None = Field(
        default=None, description="file, folder, glob or hub id of the rows to validate on; split off when absent"
    )
    validation_share: Share = Field(default=0.1, description="share of the training rows split off for validation")
    output_dir: Place = Field(description="folder of the run")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="what a row that cannot be used does")
    streaming: bool = Field(
        default=False,
        description="read a hub id while it arrives, without storing it on disk first; max_rows bounds what is taken",
    )
    max_rows: Count | None = Field(default=None, description="rows after which reading ends")
    training_split: Text = Field(default="train", description="split of a hub id to train on")
    validation_split: Text | None = Field(default=None, description="split of a hub id to validate on")
    subset: Text | None = Field(default=None, description="subset of a hub id")

    @property
    def has_validation(self) -> bool:
        """Whether any rows are kept for validation."""
        return self.validation_data is not None or self.validation_split is not None or self.validation_share > 0
