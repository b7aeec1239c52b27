"""The settings of a study of human feedback (`study.json`): what people judge, how items are queued and chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from loopos.config.diagnostics import Problem
from loopos.config.keys import Count, Duration, Fraction, Text, VariantName
from loopos.config.sections import MethodConfig
from loopos.config.study_variants import STUDY_STRATEGIES

Mode: TypeAlias = Literal["compare", "rating", "thumbs"]
STRENGTHS = ("negligibly better", "slightly better", "better", "significantly better")
"""How much better the chosen response is, from 1 to 4 (Touvron et al. 2023, Llama 2, section 3.2.1)."""


class StudyConfig(MethodConfig):
    """Settings of a study: people compare two responses, or judge one response by a rating or a thumb."""

    title: Text = Field(description="what annotators read as the name of the study")
    mode: Mode = Field(
        default="compare",
        description="compare: which of two responses is better; rating: a number for one response; thumbs: up or down",
    )
    guidelines: str = Field(default="", description="what annotators are to look at (Markdown)")
    criteria: list[Text] = Field(default=[], description="names of what is judged beside the whole response")
    use_strength: bool = Field(
        default=True, description="compare: annotators also choose how much better, from 1 (negligibly) to 4"
    )
    rating_scale: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(
        default=[1, 5], description="rating: least and greatest number"
    )
    overlap: Count = Field(default=1, description="annotators who judge each item")
    repeat_fraction: Fraction = Field(
        default=0.05, description="fraction of an annotator's items that come again unannounced, with sides swapped"
    )
    strategy: Annotated[str, VariantName(STUDY_STRATEGIES)] = Field(
        default="random", description="which items come next (`loopos list study-strategies`)"
    )
    random_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.2, description="fraction of new items that are drawn at random, whatever the strategy"
    )
    target_votes: Count | None = Field(
        default=None, description="votes after which the study is complete; overlap × items when absent"
    )
    lease: Duration = Field(default=600.0, description="time after which an item that is not answered is free (s)")
    annotators: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, description="names of those who may vote; anyone when absent"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=42, description="seed of sides, repeats and random choice"
    )

    def check(self) -> Iterator[Problem]:
        for name in ("criteria", "annotators"):
            values = getattr(self, name) or []
            repeated = sorted({value for value in values if values.count(value) > 1})
            if repeated:
                yield Problem((name,), f'"{repeated[0]}" twice', "distinct names")
        least, most = self.rating_scale
        if least >= most:
            yield Problem(("rating_scale",), f"from {least} to {most}", "the least number, then a greater one")
        if self.annotators is not None and len(self.annotators) < self.overlap:
            actual = f"{self.overlap} annotators per item, and {len(self.annotators)} who may vote"
            yield Problem(("overlap", "annotators"), actual, "an overlap of at most the number of annotators")

    def notes(self) -> list[str]:
        effects = {"use_strength": "compare", "rating_scale": "rating"}
        return [
            f"{name} has no effect: the mode is {self.mode}"
            for name, mode in effects.items()
            if mode != self.mode and name in self.model_fields_set
        ]
