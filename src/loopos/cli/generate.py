"""`loopos generate`: completions as text, as a trace of steps, or as JSON lines.

One prompt on a terminal is streamed. Everything that can be checked without torch is checked before torch is imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.cli.answers import json_lines, refuse_unwritable, say, write, write_whole
from loopos.cli.options import (
    Columns,
    Device,
    Encoding,
    LanguageModel,
    Precision,
    Raw,
    System,
    TrustRemoteCode,
    Verbose,
    device_diagnostics,
    option,
    parse_columns,
    path,
    refuse,
    text_rules,
)
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.cli.sampling_options import (
    AggregationName,
    RankingModel,
    SamplingOptions,
    StepOptions,
    StrategyName,
    chain_diagnostics,
    parsed_strategy,
    ranker_of,
    ranking_diagnostics,
    require_ranking_model,
)
from loopos.config.diagnostics import UserError
from loopos.config.paths import expanded

if TYPE_CHECKING:
    from loopos.cli.prompts import PromptInput
    from loopos.config.keys import Strategy
    from loopos.data.decoding import TextRules
    from loopos.evaluation.reasoning import Reasoner
    from loopos.generation.settings import SamplingParams
    from loopos.models.resolve import ModelRef

_MOST_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """The options of `loopos generate`."""

    prompt: Annotated[tuple[str, ...], typer.Option("--prompt", "-p", metavar="TEXT", help="Prompt; repeatable.")] = ()
    input: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="FILE", help="One prompt per line, a data file, or - for stdin.", parser=expanded
        ),
    ] = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write JSON lines to this file.", parser=path)
    ] = None
    json: Annotated[bool, typer.Option("--json", help="Print one JSON line per completion to standard output.")] = False
    steps: Annotated[bool, typer.Option("--steps", help="Show each step with its logprob, then the answer.")] = False
    samples: Annotated[int, typer.Option("--samples", "-n", help="Completions per prompt.")] = 1
    strategy: StrategyName = "single"
    reward_model: RankingModel = None
    aggregation: AggregationName = None
    num_beams: Annotated[int | None, typer.Option("--num-beams", help="Width of a token-level beam search.")] = None
    json_schema: Annotated[
        str | None,
        typer.Option(
            "--json-schema",
            metavar="FILE",
            help="JSON Schema that completions follow; {} is any JSON.",
            parser=expanded,
        ),
    ] = None
    sampling: SamplingOptions
    limits: StepOptions
    raw: Raw = False
    system: System = None
    columns: Columns = ()
    encoding: Encoding = None
    device: Device = "auto"
    precision: Precision = "auto"
    trust_remote_code: TrustRemoteCode = False
    verbose: Verbose = False

    def settings(self) -> SamplingParams:
        """The sampling settings. Raises `UserError` for values out of range and a file that is no JSON schema."""
        settings = self.sampling.settings()
        return settings if self.json_schema is None else replace(settings, json_schema=_schema(self.json_schema))


def _schema(file: str) -> str:
    """The text of a file with a JSON schema. Raises `UserError`."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        schema = json.loads(text)
    except (OSError, ValueError) as problem:
        raise UserError(f"--json-schema: {file}: {problem}; expected a file with a JSON schema") from problem
    if not isinstance(schema, dict):
        raise UserError(f"--json-schema: {file}: got {type(schema).__name__}; expected an object")
    return text


def run(location: LanguageModel, options: GenerateOptions) -> int:
    """Generates and prints. Raises `UserError`."""
    from loopos.cli.opened_models import open_reasoner, require_language_model

    strategy = checked(options)
    columns, rules = parse_columns(options.columns), text_rules(options.encoding)
    if options.output is not None:
        refuse_unwritable(options.output, source=options.input)
    model = require_language_model(location)
    reward_model = require_ranking_model(strategy, options.reward_model, options.aggregation)
    _check_votes(model, options)
    prepare_to_compute(verbose=options.verbose)
    for sentence in options.sampling.notes():
        note(sentence)
    prompts = _prompts(options, columns, rules)
    reasoner = open_reasoner(
        model,
        device=options.device,
        precision=options.precision,
        max_rows=max(_MOST_ROWS, options.num_beams or 0),
        trust_remote_code=options.trust_remote_code,
        may_vote=True,
    )
    if (
        len(prompts) == 1
        and _is_plain(options, strategy)
        and not reasoner.voters
        and not _is_for_scripts(options)
        and sys.stdout.isatty()
    ):
        for text in streamed(reasoner, prompts[0], options.settings()):
            write(text)
        say()
        return 0
    records, texts = generated(reasoner, prompts, options, strategy, reward_model)
    if not _is_for_scripts(options):
        from loopos.cli.trace import blocks

        write(blocks([each.text for each in prompts], texts) + "\n")
        return 0
    lines = json_lines(records)
    if options.output is None:
        write(lines)
        return 0
    write_whole(options.output, lines)
    note(f"{options.output}: {len(records)} lines")
    return 0


def checked(options: GenerateOptions) -> Strategy:
    """The strategy. Raises `UserError` with all problems of the options at once."""
    diagnostics = [*options.sampling.diagnostics(), *options.limits.diagnostics(options.sampling.max_new_tokens)]
    strategy = parsed_strategy(options.strategy, diagnostics)
    if not options.prompt and options.input is None:
        diagnostics.append("no prompt: use -p TEXT, or --input FILE (- is standard input)")
    if options.prompt and options.input is not None:
        diagnostics.append("-p and --input: use only one of the two")
    if options.encoding is not None and options.input is None:
        diagnostics.append("--encoding without --input: it sets how a file is read")
    if not options.raw and any(not prompt.strip() for prompt in options.prompt):
        diagnostics.append("-p: got a blank text; expected a prompt, or --raw to start from nothing")
    if options.raw and options.system is not None:
        diagnostics.append("--system with --raw: a raw prompt has no messages; put the text into the prompt")
    diagnostics += _schema_diagnostics(options, strategy)
    diagnostics += ranking_diagnostics(strategy, options.reward_model, options.aggregation)
    diagnostics += device_diagnostics(options.device, options.precision)
    diagnostics += (
        chain_diagnostics(strategy, options.strategy, samples=options.samples, temperature=options.sampling.temperature)
        if options.num_beams is None
        else _beam_diagnostics(options, strategy)
    )
    refuse(diagnostics)
    return strategy


def _schema_diagnostics(options: GenerateOptions, strategy: Strategy) -> Iterator[str]:
    """Options that conflict with a JSON schema, and a file that holds none."""
    if options.json_schema is None:
        return
    others = [*options.limits.changed(), *(name for name in ("steps", "num_beams") if getattr(options, name))]
    others += ["strategy"] if strategy.kind != "single" else []
    for name in others:
        yield f"{option(name)} with --json-schema: a schema leaves no room for steps or beams; use one of the two"
    try:
        _schema(options.json_schema)
    except UserError as problem:
        yield str(problem)


def _check_votes(model: ModelRef, options: GenerateOptions) -> None:
    """Raises `UserError` for options that a voting ensemble does not support."""
    source = model.name
    if model.ensemble is None or not model.ensemble.votes:
        return
    diagnostics = [
        f"{option(name)}: {source} is an ensemble that votes over answers; use one with method mean or logits"
        for name in ("num_beams", "raw", "json_schema")
        if getattr(options, name)
    ]
    if options.samples > 1:
        diagnostics.append(
            f"--samples {options.samples}: {source} votes and returns one answer; use --strategy "
            f"self_consistency:{options.samples} to sample as many chains of each member"
        )
    refuse(diagnostics)


def _beam_diagnostics(options: GenerateOptions, strategy: Strategy) -> Iterator[str]:
    """Options that conflict with a beam search over tokens."""
    width = options.num_beams
    assert width is not None
    if width < 1:
        yield f"--num-beams: got {width}; expected 1 or more"
    if not 1 <= options.samples <= max(width, 1):
        yield f"--samples: got {options.samples}; expected 1 to --num-beams {width}, the number of beams"
    others = [name for name in options.sampling.changed() if name not in ("max_new_tokens", "seed")]
    others += options.limits.changed() + (["steps"] if options.steps else [])
    others += ["strategy"] if strategy.kind != "single" else []
    for name in others:
        yield f"{option(name)} with --num-beams: beam search takes only the most likely tokens; use one of the two"


def _prompts(options: GenerateOptions, columns: dict[str, str], rules: TextRules) -> list[PromptInput]:
    from loopos.cli.prompts import of_text, read_prompts

    if options.input is not None:
        prompts = read_prompts(options.input, columns, raw=options.raw, rules=rules)
    else:
        prompts = [of_text(text, index, raw=options.raw) for index, text in enumerate(options.prompt)]
    return [each.with_system(options.system) for each in prompts]


def _is_for_scripts(options: GenerateOptions) -> bool:
    return options.json or options.output is not None


def _is_plain(options: GenerateOptions, strategy: Strategy) -> bool:
    """Whether completions are wanted as plain text, without steps."""
    reasons = options.steps or bool(options.limits.changed()) or strategy.kind != "single"
    return not reasons and options.num_beams is None and options.samples == 1


def streamed(reasoner: Reasoner, prompt: PromptInput, sampling: SamplingParams) -> Iterator[str]:
    """Streams the completion of one prompt."""
    settings = reasoner.sampling(sampling)
    for delta in reasoner.engine.stream([reasoner.prompt(prompt.problem)], settings):
        yield delta.text


def generated(
    reasoner: Reasoner,
    prompts: Sequence[PromptInput],
    options: GenerateOptions,
    strategy: Strategy,
    reward_model: ModelRef | None,
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """One record per completion, and the texts of each prompt for people."""
    if options.num_beams is not None:
        return _beams(reasoner, prompts, options, options.num_beams)
    if options.steps or options.limits.changed() or strategy.kind != "single" or reasoner.voters:
        return _reasoned(reasoner, prompts, options, strategy, reward_model)
    from loopos.cli.trace import completion_record

    encoded = [reasoner.prompt(each.problem) for each in prompts]
    settings, number = reasoner.sampling(options.settings()), options.samples
    completions = reasoner.engine.generate(encoded, settings, n=number)
    recorded = [each.recorded for each in prompts]
    records = [_numbered(completion_record(recorded[c.prompt_index], c), c.sample_index, number) for c in completions]
    texts = [[c.text for c in completions[first : first + number]] for first in range(0, len(completions), number)]
    return records, texts


def _reasoned(
    reasoner: Reasoner,
    prompts: Sequence[PromptInput],
    options: GenerateOptions,
    strategy: Strategy,
    reward_model: ModelRef | None,
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    from loopos.cli.trace import answered_record, chain_record, confidence_summary, described

    settings, limits, marks = options.sampling.settings(), options.limits.limits(), reasoner.step_format
    problems = [each.problem for each in prompts]
    if strategy.kind != "single" or reasoner.voters:
        ranker = ranker_of(reward_model, options.aggregation, options.device)
        found = reasoner.answer(problems, settings, strategy=strategy, limits=limits, ranker=ranker)
        texts = []
        for answered in found:
            chosen = answered.chains[answered.chosen or 0]
            text = described(chosen, marks) if options.steps else f"{chosen.text}\nanswer: {answered.answer}"
            texts.append([f"{text}\n({confidence_summary(answered)})"])
        records = [answered_record(each.recorded, one, marks) for each, one in zip(prompts, found, strict=True)]
        return records, texts
    encoded = [reasoner.prompt(problem) for problem in problems]
    found = reasoner.sample(encoded, settings, n=options.samples, limits=limits)
    records, texts = [], []
    for each, answered in zip(prompts, found, strict=True):
        lines = [chain_record(each.recorded, chain, marks) for chain in answered.chains]
        records += [_numbered(line, number, options.samples) for number, line in enumerate(lines)]
        texts.append([described(chain, marks) if options.steps else chain.text for chain in answered.chains])
    return records, texts


def _beams(
    reasoner: Reasoner, prompts: Sequence[PromptInput], options: GenerateOptions, width: int
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    from loopos.generation.beam import BeamSettings, beam_search

    stop_tokens = reasoner.template.stop_tokens
    settings = BeamSettings(num_beams=width, max_new_tokens=options.sampling.max_new_tokens, stop_token_ids=stop_tokens)
    found = beam_search(reasoner.engine, [reasoner.prompt(each.problem) for each in prompts], settings)
    ends = {*stop_tokens, *reasoner.engine.end_tokens}
    records = [
        _numbered(
            {
                "prompt": each.recorded,
                "text": beam.text,
                "logprob": beam.score * len(beam.token_ids) ** settings.length_penalty,
                "finish_reason": "stop" if beam.token_ids[-1] in ends else "length",
                "tokens": len(beam.token_ids),
            },
            number,
            options.samples,
        )
        for each, beams in zip(prompts, found, strict=True)
        for number, beam in enumerate(beams[: options.samples])
    ]
    return records, [[beam.text for beam in beams[: options.samples]] for beams in found]


def _numbered(record: dict[str, Any], sample: int, samples: int) -> dict[str, Any]:
    """The record with its sample number, if a prompt has several."""
    return record if samples == 1 else {**record, "sample": sample}
