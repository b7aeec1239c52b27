"""The options of `loopos evaluate`, and which of them apply to what is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from loopos.cli import evaluate_comparisons
from loopos.cli.options import (
    Columns,
    Device,
    Encoding,
    Json,
    Limit,
    Precision,
    Stride,
    Subset,
    Verbose,
    Window,
    argument,
    option,
    path,
)
from loopos.cli.sampling_options import (
    AggregationName,
    RankingModel,
    SamplingOptions,
    StepOptions,
    StrategyName,
    changed_fields,
)
from loopos.config.paths import expanded

OF_TEXT = ("window", "stride")
"""Options that apply only to plain text."""
_OF_LANGUAGE = (
    *("metric", "strategy", "reward_model", "aggregation", "samples", "pass_k", "checker", "reference"),
    *("limit", "output", "precision", *OF_TEXT),
)
OF_TASKS = ("task_folder", "num_fewshot", "chat")

Model = Annotated[
    str,
    argument("MODEL", "Run folder or model folder; for a language model also a weights file or hub id."),
]
Data = Annotated[
    str | None,
    argument("DATA", "Data file; omit with --tasks."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """The options of `loopos evaluate`."""

    metric: tuple[str, ...] = field(default=(), metadata={"help": "accuracy, loss or perplexity; repeatable."})
    strategy: StrategyName = "single"
    reward_model: RankingModel = None
    aggregation: AggregationName = None
    samples: Annotated[
        int, typer.Option("--samples", "-n", help="Sampled chains per problem, for a majority vote.")
    ] = 1
    pass_k: tuple[int, ...] = field(default=(), metadata={"help": "k of pass@k and majority@k; repeatable."})
    checker: str = field(
        default="auto", metadata={"help": "auto, exact, numeric, choice, math_verify, reasoning_gym, module:function."}
    )
    sampling: Annotated[SamplingOptions, Subset(("temperature", "top_k", "top_p", "max_new_tokens", "seed"))]
    limits: StepOptions
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="For comparisons: reference of a policy's implicit rewards, or none; default: where its run began.",
            parser=expanded,
        ),
    ] = None
    limit: Limit = None
    window: Window = None
    stride: Stride = None
    tasks: tuple[str, ...] = field(
        default=(), metadata={"help": "lm-eval tasks; repeatable.", "metavar": "NAME[,NAME]"}
    )
    task_folder: Annotated[
        Path | None, typer.Option("--task-folder", help="Folder of your own lm-eval .yaml tasks.", parser=path)
    ] = None
    num_fewshot: int | None = field(default=None, metadata={"help": "Few-shot examples before each task question."})
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template to tasks.")] = False
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="One JSON line per problem; for a model with a head, every row, mistakes first (.jsonl, .csv, .tsv).",
            parser=path,
        ),
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE.html",
            help="For models with a head: metrics, classes, confusion or residuals, and mistakes as an HTML page.",
            parser=path,
        ),
    ] = None
    columns: Columns = ()
    encoding: Encoding = None
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Skip and count rows that cannot be used.")] = (
        False
    )
    device: Device = "auto"
    precision: Precision = "auto"
    json: Json = False
    verbose: Verbose = False

    def changed(self, names: tuple[str, ...]) -> list[str]:
        """Those of the options that differ from their defaults, as written on the command line."""
        changed = changed_fields(self)
        return [option(name) for name in names if name in changed]

    def language(self) -> list[str]:
        """The options of language models that differ from their defaults."""
        others = (*self.sampling.changed(), *self.limits.changed())
        return self.changed(_OF_LANGUAGE) + [option(name) for name in others]

    def of_comparisons(self) -> evaluate_comparisons.ComparisonOptions:
        """Those that apply to comparisons, and the names of all that were used."""
        return evaluate_comparisons.ComparisonOptions(
            of_language=self.language(),
            reference=self.reference,
            limit=self.limit,
            output=self.output,
            report=self.report,
            skip_bad_rows=self.skip_bad_rows,
            device=self.device,
            precision=self.precision,
            json=self.json,
            verbose=self.verbose,
        )
