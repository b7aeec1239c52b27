"""`loopos train`: checks the config, claims the run folder, runs the method and prints the outcome.

The summary (or one JSON object) goes to standard output, progress to standard error. Exit codes: 0, also after SIGTERM,
SIGHUP and SIGUSR1; 130 after Ctrl-C; 4 after a guard. Checks that need no torch run before torch is imported;
what the installed torch was built for is read from its files, because importing it takes seconds.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.cli.answers import say, say_json, shown
from loopos.cli.options import Config, Json, Overrides, TrustRemoteCode, Verbose
from loopos.cli.process import prepare_to_compute, settings_in_force
from loopos.config.diagnostics import SettingError, UserError
from loopos.config.figures import as_time, once
from loopos.config.methods import config_classes, methods_help
from loopos.data.read_ahead import reuse_in_training

if TYPE_CHECKING:
    from loopos.evaluation.run_folder import RunFolder
    from loopos.training.run_state import FitResult

_TORCH_LINE = re.compile(r"^(__version__|cuda|hip|xpu)\b[^=]*= *(.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """The options of `loopos train`."""

    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest complete checkpoint.")] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, tokens, steps, memory, disk and time; do not train.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only warnings.")] = False
    num_processes: Annotated[
        int | None, typer.Option("--nproc", help="Processes on this machine, one per GPU. Several machines: torchrun.")
    ] = None
    trust_remote_code: TrustRemoteCode = False
    json: Json = False
    verbose: Verbose = False

    def arguments(self) -> list[str]:
        """The options as written on the command line, except the number of processes."""
        actual = {
            "--resume": self.resume,
            "--quiet": self.quiet,
            "--trust-remote-code": self.trust_remote_code,
            "--json": self.json,
            "--verbose": self.verbose,
        }
        return [option for option, is_set in actual.items() if is_set]


def more_help() -> str:
    """The methods, for the help text."""
    return methods_help()


def run(path: Config, options: TrainOptions, overrides: Overrides = ()) -> int:
    """Trains, or with `dry_run` only prints what training would need. Raises `UserError`."""
    from loopos.cli import configs
    from loopos.config.load import load

    loaded = load(path, overrides, config_classes())
    # Any: each method has its own config class, which `load` has checked.
    config: Any = loaded.config
    # Report a model that is not installed or a folder in use now, not after the slow imports below.
    from loopos.data.row_check import check_columns, check_rows
    from loopos.evaluation.run_claim import refuse_started
    from loopos.methods.train import active_folder, is_first_process, run_folders
    from loopos.models.resolve import check_tokenizer_source, resolve
    from loopos.storage.durable import require_writable
    from loopos.storage.folder_lock import refuse_busy
    from loopos.training.stopping import run_ends_at_once

    check_columns(config)
    for section in (config.training, getattr(config, "reward_training", None) or config.training):
        refuse_absent_device(section.device, section.precision)
    # One process of a run is enough to report this, and only the first will lock the folder.
    for folder in [] if options.dry_run or not is_first_process() else run_folders(config):
        refuse_busy(folder)
        if not options.resume:
            refuse_started(folder)
    if not options.dry_run:
        require_writable("data.output_dir", Path(config.data.output_dir))
    check_tokenizer_source(config.data.tokenizer)
    named = getattr(config.data, "pretrained_weights", None)
    if named is not None:
        resolve(named)
    if options.num_processes is not None and not options.dry_run:
        check_rows(config)
        return _launch(path, overrides, options)
    prepare_to_compute(verbose=options.verbose)
    configs.print_notes(loaded)
    if options.dry_run:
        return _plan(config, options)
    with run_ends_at_once():
        result = train(config, options)
    if is_first_process():
        print_outcome(active_folder(config), result, as_json=options.json)
    return exit_code(result.stopped_by)


def _plan(config: Any, options: TrainOptions) -> int:
    """Prints what training would take; 3 where it needs more memory or disk than there is. Raises `UserError`."""
    from loopos.data.row_check import check_rows

    with reuse_in_training():
        check_rows(config)
        from loopos.planning import dry_run

        plan = dry_run.plan_of(config, trust_remote_code=options.trust_remote_code)
    if options.json:
        say_json(plan)
    else:
        say(dry_run.described(plan))
    return 0 if dry_run.fits(plan) else dry_run.DOES_NOT_FIT


def _launch(path: Path, overrides: Sequence[str], options: TrainOptions) -> int:
    """Runs the same command in several processes. Raises `UserError`."""
    assert options.num_processes is not None
    if options.num_processes < 1:
        raise UserError(f"--nproc: got {options.num_processes}; expected 1 or more")
    from loopos.cli.launch import launch

    return launch(["train", str(path), *overrides, *options.arguments()], options.num_processes)


def train(config: Any, options: TrainOptions) -> FitResult:
    """Runs the config's method to its end."""
    from loopos.methods.train import RunOptions, train_config

    return train_config(
        config, RunOptions(options.resume, options.quiet, options.trust_remote_code, settings_in_force())
    )


def exit_code(stopped_by: str) -> int:
    """0, except for a run that ended by Ctrl-C or a guard."""
    from loopos.training.stopping import EXIT_CODES, GUARD, GUARD_EXIT_CODE

    if stopped_by == GUARD:
        # A launcher kills all processes once one has failed, so only the first, which has reported by now, may fail.
        from loopos.methods.train import is_first_process

        return GUARD_EXIT_CODE if is_first_process() else 0
    return EXIT_CODES.get(stopped_by, 0)


def print_outcome(run_dir: Path, result: FitResult, *, as_json: bool) -> None:
    """Prints how the run ended to standard output."""
    from loopos.cli.opened_models import use_of
    from loopos.evaluation.run_folder import read_run

    found = read_run(run_dir)
    if as_json:
        say_json(_as_json(run_dir, result, found))
        return
    rate_text = f" at {found.tokens_a_second:,.0f} tokens/s" if found.tokens_a_second is not None else ""
    say(f"{run_dir}: {result.step} steps{rate_text}, {as_time(result.seconds)} total; {found.ended}")
    verdict, metrics = found.outcome.verdict(), once(found.exported_metrics)
    if metrics and found.exported_step is not None:
        figures = ", ".join(f"{name} {shown(value)}" for name, value in metrics.items())
        say(f"  validation at step {found.exported_step}: {figures}")
    if found.outcome.beat_start is not False and verdict:
        say(f"  {verdict}")
    if result.interrupted:
        say("  continue: the same command with --resume")
        say(f"  report so far: loopos runs report {run_dir}")
    elif found.has_model:
        say(f"  {use_of(str(run_dir))}")
    if found.outcome.beat_start is False:
        # Last, where it is not overlooked.
        say(f"  {verdict}")


def _as_json(run_dir: Path, result: FitResult, found: RunFolder) -> dict[str, Any]:
    return {
        "run": str(run_dir),
        "step": result.step,
        "stopped_by": result.stopped_by,
        "ended": found.ended,
        "best_step": result.best_step,
        "best_metric": result.best_metric,
        "beat_start": found.outcome.beat_start,
        "start_metric": result.start_metric,
        "exported_step": found.exported_step,
        "metrics": found.exported_metrics,
        "tokens": result.tokens,
        "tokens_per_second": found.tokens_a_second,
        "seconds": result.seconds,
        "model": str(run_dir / "model") if found.has_model else None,
    }


def refuse_absent_device(device: str, precision: str) -> None:
    """Raises `SettingError` for a device that the installed torch does not support, and for fp16 without CUDA. Passes
    if the files do not tell.
    """
    found = _built_for()
    if found is None:
        return
    version, has_cuda = found
    if device == "cuda" and not has_cuda:
        problem = f"got cuda, but the installed torch {version} is built without CUDA; use auto or cpu"
        raise SettingError("training.device", problem)
    if device == "mps" and sys.platform != "darwin":
        raise SettingError("training.device", "got mps, which only macOS has; use auto or cpu")
    if precision == "fp16" and (not has_cuda or device in ("cpu", "mps")):
        where = device if device != "auto" else f"the default of torch {version}"
        problem = f"got fp16, but only CUDA trains in fp16, and the device is {where}; use auto, fp32 or bf16"
        raise SettingError("training.precision", problem)


def _built_for() -> tuple[str, bool] | None:
    """torch's version, and whether it supports CUDA or ROCm; None if torch or its version.py is missing."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return None
    fields = dict(_TORCH_LINE.findall(file.read_text(encoding="utf-8")))
    if "__version__" not in fields or "cuda" not in fields:
        return None
    return fields["__version__"].strip("'\""), fields["cuda"] != "None" or fields.get("hip", "None") != "None"
