"""The commands of `loopos`: names, options and help texts.

What a command does is in its own module, imported when it runs, so that `--help` needs neither torch nor pydantic. Help
is plain text (`rich_markup_mode=None`): rich's panels take three times as long to start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import loopos
from loopos.cli import cluster_commands, deploy_commands, export_commands, language_commands
from loopos.cli.option_types import (
    Columns,
    Config,
    Device,
    Encoding,
    Json,
    Overrides,
    RunFolder,
    TrustRemoteCode,
    Verbose,
    path,
)
from loopos.cli.outcome import Commands
from loopos.config.methods import methods_help
from loopos.config.paths import expanded

app = typer.Typer(
    cls=Commands,
    name="loopos",
    help="Post-training of language models from one config and one command.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(cls=Commands, help="Inspect data before training.", no_args_is_help=True, rich_markup_mode=None)
runs_app = typer.Typer(
    cls=Commands, help="Inspect finished and running runs.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Post-training of language models from one config and one command."""
    if version:
        typer.echo(f"loopos {loopos.__version__}")
        raise typer.Exit()


@app.command(help=f"Train a model from a config.\n\n{methods_help()}")
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest complete checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, tokens, steps, memory, disk and time; do not train.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only warnings.")] = False,
    nproc: Annotated[
        int | None, typer.Option("--nproc", help="Processes on this machine, one per GPU. Several machines: torchrun.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    from loopos.cli import train as command

    options = command.TrainOptions(resume, dry_run, quiet, trust_remote_code, json, verbose, nproc)
    raise typer.Exit(command.run(config, overrides or [], options))


@app.command()
def validate(config: Config, overrides: Overrides = None, json: Json = False) -> None:
    """Check a config and report all problems at once, each with its line and column."""
    from loopos.cli import configs as command

    raise typer.Exit(command.validate(config, overrides or [], as_json=json))


@app.command("list")
def list_variants(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="Such as methods; the kinds when absent.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """List what a config can name, with what installed plugins add."""
    from loopos.cli import configs as command

    raise typer.Exit(command.list_variants(kind, as_json=json))


@app.command()
def schema(
    method: Annotated[str, typer.Option("--method", help="Method whose config schema to print.")] = "fine_tuning",
) -> None:
    """Print the JSON Schema of a config."""
    from loopos.cli import configs as command

    raise typer.Exit(command.schema(method))


@app.command()
def predict(
    run: RunFolder,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="Data file, .txt with one text per line, or - for one text per line from standard input.",
            show_default=False,
            parser=expanded,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Output file; default: standard output.", parser=path)
    ] = None,
    file_format: Annotated[
        str | None, typer.Option("--format", help="jsonl, csv or tsv; default: by the suffix of -o, else jsonl.")
    ] = None,
    columns: Columns = None,
    encoding: Encoding = None,
    device: Device = "auto",
    verbose: Verbose = False,
) -> None:
    """Predict every row of the input, in order."""
    from loopos.cli import predict as command

    options = command.PredictOptions(output, file_format, tuple(columns or ()), encoding, device, verbose)
    raise typer.Exit(command.run(run, source, options))


@app.command()
def score(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Output folder of a reward_model run, or its model/ folder.",
            show_default=False,
            parser=expanded,
        ),
    ],
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="File, folder or glob of comparisons.", show_default=False, parser=expanded
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Output file; default: standard output.", parser=path)
    ] = None,
    columns: Columns = None,
    encoding: Encoding = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Skip rows that cannot be used.")] = False,
    ensemble_penalty: Annotated[
        float,
        typer.Option("--ensemble-penalty", min=0, help="Standard deviations of the heads to subtract from their mean."),
    ] = 0.0,
    device: Device = "auto",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Score responses with a reward model; with --json print only its agreement with people."""
    from loopos.cli import score as command

    options = command.ScoreOptions(
        output, tuple(columns or ()), encoding, skip_bad_rows, ensemble_penalty, device, json, verbose
    )
    raise typer.Exit(command.run(model, source, options))


@app.command()
def merge(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE | MODEL... [KEY=VALUE ...]",
            help="Recipe (.json or .yaml) or models, then recipe keys as KEY=VALUE.",
            show_default=False,
            parser=expanded,
        ),
    ],
    method: Annotated[str | None, typer.Option("--method", help="Merge method; see docs/merging.md.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model that the others were trained from.", parser=expanded)
    ] = None,
    weight: Annotated[list[float] | None, typer.Option("--weight", help="Weight of each model, in order.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Output folder.", parser=path)] = None,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluate", metavar="DATA", help="Data to evaluate inputs and result on; repeatable.", parser=expanded
        ),
    ] = None,
    device: Device = "auto",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Merge models or adapters into one."""
    from loopos.cli import merge as command

    options = command.MergeOptions(
        method, base, tuple(weight or ()), output, tuple(evaluate or ()), device, json, verbose
    )
    raise typer.Exit(command.run(arguments, options))


app.command()(cluster_commands.plan)
app.command()(language_commands.evaluate)
app.command()(language_commands.winrate)
app.command()(language_commands.generate)
app.command()(language_commands.chat)
app.command()(language_commands.serve)
app.command()(deploy_commands.prune)
app.command()(deploy_commands.quantize)
app.command()(export_commands.export)
app.command()(export_commands.ensemble)


@data_app.command("check")
def data_check(
    source: Annotated[
        str,
        typer.Argument(metavar="FILE", help="File, folder, glob or hub id.", show_default=False, parser=expanded),
    ],
    columns: Columns = None,
    encoding: Encoding = None,
    json: Json = False,
) -> None:
    """Check a data file as training would read it: contents, lengths, duplicates, problems."""
    from loopos.cli import data_check as command

    raise typer.Exit(command.run(source, columns or [], encoding=encoding, as_json=json))


@data_app.command("preview")
def data_preview(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Number of rows to show.")] = 3,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = False,
) -> None:
    """Show the first training rows as tokens: which are learned or pooled, context or cut."""
    from loopos.cli import data_preview as command

    raise typer.Exit(
        command.run(config, overrides or [], num_rows=rows, trust_remote_code=trust_remote_code, verbose=verbose)
    )


@runs_app.command("list")
def runs_list(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of runs.", parser=path)] = Path("outputs"),
    json: Json = False,
) -> None:
    """List the runs in a folder with their state and best metrics."""
    from loopos.cli import runs as command

    raise typer.Exit(command.list_runs(folder, as_json=json))


@runs_app.command("show")
def runs_show(
    run: RunFolder,
    every: Annotated[bool, typer.Option("--all", help="Also show settings at their defaults.")] = False,
    json: Json = False,
) -> None:
    """Show one run: settings, state, validation metrics against the start, confusion table."""
    from loopos.cli import runs as command

    raise typer.Exit(command.show(run, as_json=json, every_setting=every))


@runs_app.command("report")
def runs_report(
    run: RunFolder,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Folder for the report.", show_default="the run's", parser=path
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write report.md and report.html of a finished, running or killed run."""
    from loopos.cli import runs as command

    raise typer.Exit(command.report(run, output, as_json=json))


@runs_app.command("diff")
def runs_diff(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="Output folder of a run.", show_default=False, parser=path)
    ],
    second: Annotated[
        Path, typer.Argument(metavar="B", help="Output folder of another run.", show_default=False, parser=path)
    ],
    json: Json = False,
) -> None:
    """Compare two runs: different settings, and metrics side by side."""
    from loopos.cli import runs as command

    raise typer.Exit(command.diff(first, second, as_json=json))


@app.command()
def doctor(json: Json = False) -> None:
    """Print versions, cores, memory, devices, extras and settings in force."""
    from loopos.cli import doctor as command

    raise typer.Exit(command.run(as_json=json))


@app.command()
def demo(verbose: Verbose = False) -> None:
    """Train a real 135M-parameter model on packaged data: fine-tuning, chain of thought, preferences."""
    from loopos.cli import demo as command

    raise typer.Exit(command.run(verbose=verbose))
