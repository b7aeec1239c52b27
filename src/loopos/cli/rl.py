"""`loopos rl check`: whether the prompts and rewards of an online run give it something to learn, before it trains.
`loopos rl audit`: signs of reward hacking in the answers that a run stored.

The check samples answers with the weights, the sampling and the rewards of the config, prints figures and what to
change, and writes the prompts that carry signal: `methods.signal_check`, `evaluation.signal`. The audit opens no model:
`evaluation.audit`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.cli.answers import refuse_unwritable, say, say_json, table, write_whole
from loopos.cli.options import Config, Json, Overrides, RunFolder, TrustRemoteCode, Verbose, path, refuse
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.config.diagnostics import UserError, printable_json
from loopos.config.figures import as_time

if TYPE_CHECKING:
    from loopos.config.ppo import PpoConfig
    from loopos.methods.signal_check import SignalCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """The options of `loopos rl check`."""

    prompts: Annotated[int, typer.Option("--prompts", help="Prompts to answer, the first ones of training.")] = 64
    samples: Annotated[int, typer.Option("--samples", "-n", help="Answers to each prompt.")] = 8
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="Reward from which an answer passes; default: 1 if all rewards are 0 or 1."),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the rows of the prompts whose answers differ in reward (.jsonl).",
            parser=path,
        ),
    ] = None
    trust_remote_code: TrustRemoteCode = False
    json: Json = False
    verbose: Verbose = False


def check(file: Config, options: CheckOptions, overrides: Overrides = ()) -> int:
    """Samples, scores, and prints figures and advice. Raises `UserError`."""
    from loopos.config.load import load
    from loopos.config.methods import config_classes, method_row
    from loopos.config.ppo import PpoConfig

    refuse([*_diagnostics(options)])
    loaded = load(file, overrides, config_classes())
    config: Any = loaded.config
    if not isinstance(config, PpoConfig):
        raise UserError(
            f"{file}: got the method {config.computation.method}; expected one that generates answers while it trains, "
            "such as ppo or grpo"
        )
    if options.output is not None:
        refuse_unwritable(options.output, source=config.data.source)
    from loopos.cli import configs
    from loopos.data.row_check import check_columns, check_rows

    check_columns(config)
    check_rows(config)
    prepare_to_compute(verbose=options.verbose)
    configs.print_notes(loaded)
    from loopos.methods.signal_check import check_signal, prompt_rows
    from loopos.training.progress import RunProgress

    trainer = method_row(config.computation.method).trainer_class(
        config, progress=RunProgress(), trust_remote_code=options.trust_remote_code
    )
    found = check_signal(trainer, num_prompts=options.prompts, num_answers=options.samples)
    if options.output is not None:
        rows = prompt_rows(found)
        lines = [printable_json(json.dumps(row, ensure_ascii=False, default=str)) + "\n" for row in rows]
        write_whole(options.output, "".join(lines))
        note(f"{options.output}: {len(rows)} of {len(found.prompts)} prompts")
    _print(file, config, found, options)
    return 0


def audit(folder: RunFolder, json: Json = False) -> int:
    """Prints what the stored answers of a run show, and writes its report with examples. Raises `UserError`."""
    from loopos.evaluation.audit import signs_of, weights_of
    from loopos.evaluation.report import write_report
    from loopos.evaluation.run_folder import ROLLOUTS, SAMPLES, read_run

    run = read_run(folder)
    records = run.rollouts or run.samples
    if not any("reward" in record for record in records):
        raise UserError(
            f"{folder}: got no answers with rewards; expected {ROLLOUTS} (training.log_rollouts) or {SAMPLES} "
            "(validation prompts) of a run that learns from rewards"
        )
    found = signs_of(records, weights_of(run.config))
    report = write_report(folder)
    if json:
        named = [{"name": each.name, "sentence": each.sentence, "severity": each.severity} for each in found]
        say_json({"run": str(folder), "answers": len(records), "signs": named, "report": str(report)})
        return 0
    source = ROLLOUTS if run.rollouts else SAMPLES
    say(f"{folder}: {len(records):,} answers of {source}, the first quarter of the run against the last")
    if not found:
        say("nothing looks like reward hacking")
        return 0
    say(table([(each.name, each.sentence) for each in found]))
    say(f"examples: {report}")
    return 0


def _diagnostics(options: CheckOptions) -> list[str]:
    """Messages for numbers out of range."""
    found = [f"--prompts: got {options.prompts}; expected 1 or more"] * (options.prompts < 1)
    return found + [f"--samples: got {options.samples}; expected 2 or more"] * (options.samples < 2)


def _print(file: Path, config: PpoConfig, found: SignalCheck, options: CheckOptions) -> None:
    from loopos.evaluation.signal import advice, signal_metrics

    groups = [each.group for each in found.prompts]
    threshold = options.threshold if options.threshold is not None else 1.0 if found.is_binary else None
    group_size = config.generation.responses_per_prompt
    metrics = signal_metrics(groups, weights=found.weights, threshold=threshold, group_size=group_size)
    sentences = [*advice(metrics, compares_groups=config.algorithm.groups, temperature=config.generation.temperature)]
    metrics["seconds"] = found.seconds
    metrics["seconds_per_iteration"] = found.seconds * config.training.batch_size / metrics["responses"]
    if options.json:
        say_json({"config": str(file), "metrics": metrics, "advice": sentences})
        return
    say(f"{file}: {metrics['prompts']:,} prompts, {metrics['responses']:,} answers in {as_time(found.seconds)}")
    passing = [(name, *each.values()) for name, each in metrics.items() if name.startswith("pass@")]
    if passing:
        say(table(passing, head=("", "rate", "95% from", "to")))
    say(table([(name, value) for name, value in metrics.items() if isinstance(value, int | float)]))
    say(_parts_table(metrics["parts"]))
    for sentence in sentences or ["the prompts give signal; nothing to change"]:
        say(sentence)


def _parts_table(parts: Mapping[str, Mapping[str, float]]) -> str:
    rows = [(name, each["mean"], each["std"], each["no_signal"]) for name, each in parts.items()]
    return table(rows, head=("reward", "mean", "std", "groups without signal"))
