"""The options of `loopos sample`, and messages for those that contradict each other; without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopos.cli.options import (
    Columns,
    Device,
    Encoding,
    Json,
    Limit,
    Precision,
    Raw,
    Subset,
    System,
    TrustRemoteCode,
    Verbose,
    device_diagnostics,
    option,
    path,
)
from loopos.cli.sampling_options import SamplingOptions, changed_fields
from loopos.config.paths import expanded
from loopos.config.variants import REWARDS

if TYPE_CHECKING:
    from loopos.rl.selection import SelectionRule

KEEP = ("best", "pairs", "groups", "all")
PAIRS = ("best-worst", "random", "all")
CHECKERS = frozenset({"auto", "exact", "numeric", "choice", "math_verify", "reasoning_gym"})


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions:
    """Who scores the answers; at most one judge."""

    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="JUDGE",
            help="Reward-model run, module:function, or a checker such as numeric.",
            show_default=False,
            parser=expanded,
        ),
    ] = None
    judge_options: Annotated[
        str | None,
        typer.Option("--judge-options", metavar="JSON", help="Options of the reward function that --judge names."),
    ] = None
    judge_model: Annotated[
        str | None,
        typer.Option("--judge-model", metavar="MODEL", help="Language model that grades the answers.", parser=expanded),
    ] = None
    grading_prompt: Annotated[
        Path | None,
        typer.Option("--grading-prompt", help="Text file with {prompt}, {response} and names of columns.", parser=path),
    ] = None
    grades: Annotated[
        str, typer.Option("--grades", help="Grades of --judge-model: a good and a bad word, or numbers.")
    ] = "yes,no"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherOptions:
    """Who writes the answers that MODEL is to learn from."""

    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL_OR_URL",
            help="Answer with this model, or an OpenAI-compatible endpoint, in place of MODEL, which learns from it.",
            parser=expanded,
        ),
    ] = None
    teacher_model: Annotated[
        str | None, typer.Option("--teacher-model", help="Name of the model at the endpoint.", metavar="NAME")
    ] = None
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", help="Environment variable with the key.", metavar="VARIABLE")
    ] = None
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="Keep the K most likely tokens at each place, for distillation.", metavar="K"),
    ] = None

    @property
    def is_endpoint(self) -> bool:
        """Whether the answers come over HTTP."""
        return self.teacher is not None and self.teacher.startswith(("http://", "https://"))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepOptions:
    """Which answers become rows."""

    keep: Annotated[str, typer.Option("--keep", help="best, pairs, groups or all.")] = "best"
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Score from which an answer passes; checkers: 1.")
    ] = None
    min_margin: Annotated[float, typer.Option("--min-margin", help="Minimum difference of the scores of a pair.")] = 0.0
    pairs: Annotated[
        str, typer.Option("--pairs", help="best-worst, random (best against a random worse one) or all.")
    ] = "best-worst"
    top: Annotated[int, typer.Option("--top", help="Maximum answers of a prompt for --keep best.")] = 1
    allow_cut: Annotated[bool, typer.Option("--allow-cut", help="Also choose answers that end at the token limit.")] = (
        False
    )

    def rule(self, threshold: float | None, seed: int) -> SelectionRule:
        """threshold: of the judge, which counts where the option is absent."""
        from loopos.rl.selection import SelectionRule

        return SelectionRule(
            threshold=threshold if self.threshold is None else self.threshold,
            min_margin=self.min_margin,
            pairs=self.pairs,  # type: ignore[arg-type]
            top=self.top,
            allow_cut=self.allow_cut,
            seed=seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """The options of `loopos sample`."""

    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.", show_default=False, parser=path)]
    samples: Annotated[int, typer.Option("--samples", "-n", help="Answers to each prompt.")] = 8
    taught: TeacherOptions
    judged: JudgeOptions
    selected: KeepOptions
    sampling: Annotated[
        SamplingOptions,
        Subset(
            ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "stop", "seed"), defaults={"temperature": 1.0}
        ),
    ]
    chunk: Annotated[
        int | None,
        typer.Option(
            "--chunk", help="Prompts sampled together, the most that a kill costs; default: enough for 512 answers."
        ),
    ] = None
    limit: Limit = None
    raw: Raw = False
    system: System = None
    columns: Columns = ()
    encoding: Encoding = None
    device: Device = "auto"
    precision: Precision = "auto"
    trust_remote_code: TrustRemoteCode = False
    json: Json = False
    verbose: Verbose = False


def diagnostics(options: SampleOptions) -> Iterator[str]:
    """Messages for invalid options; without torch."""
    judged, selected = options.judged, options.selected
    yield from options.sampling.diagnostics()
    yield from device_diagnostics(options.device, options.precision)
    for name, value in (("samples", options.samples), ("chunk", options.chunk), ("limit", options.limit),
                        ("logprobs", options.taught.logprobs),
                        ("top", selected.top)):  # fmt: skip
        if value is not None and value < 1:
            yield f"{option(name)}: got {value}; expected 1 or more"
    if options.samples > 1 and options.sampling.temperature == 0:
        yield f"--samples {options.samples} at --temperature 0: all answers would be equal; use a temperature above 0"
    yield from _teacher_diagnostics(options)
    if options.taught.logprobs is not None and selected.keep in ("pairs", "groups"):
        yield f"--logprobs with --keep {selected.keep}: distillation reads single answers; use --keep all or best"
    if options.raw and options.system is not None:
        yield "--system with --raw: a raw prompt has no messages; put the text into the prompt"
    if judged.judge is not None and judged.judge_model is not None:
        yield "--judge and --judge-model: use only one of the two"
    yield from _option_diagnostics(judged)
    if judged.judge_model is None:
        for name in changed_fields(judged):
            if name not in ("judge", "judge_options"):
                yield f"{option(name)} without --judge-model: it sets how a language model grades"
    for name, actual, known in (("keep", selected.keep, KEEP), ("pairs", selected.pairs, PAIRS)):
        if actual not in known:
            yield f"{option(name)}: got {actual}; expected one of {', '.join(known)}"
    if judged.judge is None and judged.judge_model is None:
        if selected.keep != "all":
            yield f"--keep {selected.keep}: needs scores; use --judge or --judge-model, or --keep all"
        for name in ("threshold", "allow_cut"):
            if name in changed_fields(selected):
                yield f"{option(name)}: needs scores; use --judge or --judge-model"
    yield from _idle_options(options)


def _option_diagnostics(judged: JudgeOptions) -> Iterator[str]:
    """Messages for --judge-options that are no options of a reward function."""
    if judged.judge_options is None:
        return
    if judged.judge is None or judged.judge in CHECKERS or not is_function(judged.judge):
        yield "--judge-options: needs a reward function as --judge, such as regex (`loopos list rewards`)"
    try:
        found = json.loads(judged.judge_options)
    except ValueError as problem:
        yield f"--judge-options: not JSON: {problem}"
        return
    if not isinstance(found, dict):
        yield f'--judge-options: got {judged.judge_options}; expected a section such as {{"pattern": "[0-9]+"}}'


def is_function(name: str) -> bool:
    """Whether --judge names a reward function rather than the folder of a reward model."""
    return name in REWARDS or (":" in name and not os.path.exists(name))


def _teacher_diagnostics(options: SampleOptions) -> Iterator[str]:
    """Options of a teacher that contradict each other."""
    taught = options.taught
    if not taught.is_endpoint:
        for name in ("teacher_model", "api_key_env"):
            if getattr(taught, name) is not None:
                yield f"{option(name)}: needs an endpoint; use --teacher http://HOST/v1"
        return
    if taught.teacher_model is None:
        yield "--teacher with a URL: needs the name of the model there; use --teacher-model"
    if taught.logprobs is not None:
        yield "--logprobs with an endpoint: its tokens may be others than MODEL's; use --teacher with a model"
    if options.raw:
        yield "--raw with an endpoint: it answers messages; leave --raw out"
    for name in changed_fields(options.sampling):
        if name in ("top_k", "min_p"):
            yield f"{option(name)} with an endpoint: OpenAI's API has no such setting"


def _idle_options(options: SampleOptions) -> Iterator[str]:
    """Options that --keep or a single answer gives no effect."""
    selected = options.selected
    uses = {"pairs": ("pairs",), "min_margin": ("pairs",), "top": ("best",), "threshold": ("best", "pairs", "all"),
            "allow_cut": ("best", "pairs", "all")}  # fmt: skip
    for name in changed_fields(selected):
        if name in uses and selected.keep in KEEP and selected.keep not in uses[name]:
            yield f"{option(name)} with --keep {selected.keep}: it belongs to --keep {' or '.join(uses[name])}"
    if selected.min_margin < 0:
        yield f"--min-margin: got {selected.min_margin:g}; expected 0 or more"
    if selected.keep in ("pairs", "groups") and options.samples == 1:
        yield f"--keep {selected.keep} with --samples 1: two answers are compared; use --samples 2 or more"
