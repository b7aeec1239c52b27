"""`loopos.Run`: a finished or running run in Python, with its result, metrics, samples and model."""

from __future__ import annotations

import html
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopos.config.diagnostics import UserError
from loopos.config.figures import as_time, figure, once
from loopos.evaluation.run_folder import RunFolder

if TYPE_CHECKING:
    import pandas

    from loopos.evaluation.opening import Kind, Opened
    from loopos.training.run_state import FitResult

# Metrics that a notebook shows of a run; `metrics` has all.
_MOST_METRICS = 12


class Run(RunFolder):
    """One run: `loopos.Run("outputs/run")` opens it, and `loopos.train` returns it.

    `folder`, `config`, `events`: what the run has written. `metrics`: validation metrics of the exported weights.
    `history`: logged steps and validations. `samples`: generated texts. `model`: the trained model. The fields of
    `result` (`step`, `stopped_by`, `best_step`, `best_metric`, `tokens`, `seconds`, …) are attributes of the run too.

    A run that is still going is read as it was when it was opened; open it again to see more. Raises
    `loopos.UserError` for a folder without a run.
    """

    def __init__(self, folder: str | os.PathLike[str], result: FitResult | None = None) -> None:
        """folder: the `output_dir` of a run. result: of the training, if this process ran it."""
        super().__init__(folder)
        self._result = result
        # Under torchrun the folder may be on another host: there only the result is known.
        if result is None:
            self.read()

    @property
    def result(self) -> FitResult:
        """How the training ended. Of a run that another process trained it is made from the log. Raises
        `loopos.UserError` if the run has not ended.
        """
        if self._result is None:
            self._result = _logged_result(self)
        return self._result

    @property
    def stopped_by(self) -> str:
        """Why the run ended, for example "epochs", "max_steps", "early stopping" or "SIGINT"; see `FitResult`."""
        return self.result.stopped_by

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C, another signal or a failed callback ended the run; `resume=True` continues it."""
        return self.result.interrupted

    @property
    def step(self) -> int:
        """Number of optimizer steps so far."""
        return super().step if self._result is None else self._result.step

    @property
    def tokens(self) -> int:
        """Number of tokens trained on."""
        return self.result.tokens

    @property
    def seconds(self) -> float:
        """Time in optimizer steps, validations and checkpoints (s)."""
        return self.result.seconds

    @property
    def best_step(self) -> int | None:
        """Optimizer step of the best validation; None if none beat the start."""
        return super().best_step if self._result is None else self._result.best_step

    @property
    def best_metric(self) -> float | None:
        """The deciding metric of the best validation; None if none beat the start."""
        return self.result.best_metric

    @property
    def best_trained_step(self) -> int | None:
        """Optimizer step of the best validation after the start, whether or not it beat the start."""
        return self.result.best_trained_step

    @property
    def best_trained_metric(self) -> float | None:
        """The deciding metric of that validation."""
        return self.result.best_trained_metric

    @property
    def start_metric(self) -> float | None:
        """The deciding metric before the first update."""
        return self.result.start_metric

    @property
    def beat_start(self) -> bool | None:
        """Whether training beat the start; None if unknown."""
        return self.result.beat_start

    @property
    def metrics(self) -> dict[str, Any]:
        """Validation metrics of the weights that are exported; empty without validation."""
        return self.exported_metrics

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged steps and validations in order, each one flat dict: `event`, `step`, its metrics, and `seconds`.
        `to_pandas` has them as a table, `events` has everything that was logged.
        """
        return [
            {"event": event["event"], "step": event["step"], **event["metrics"], **event["timing"]}
            for event in self.events
            if event["event"] in ("step", "validation")
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """`history` as a DataFrame: `run.to_pandas().plot(x="step", y="loss")`."""
        import pandas

        return pandas.DataFrame(self.history)

    @cached_property
    def model(self) -> Any:
        """The trained model, opened at the first use, as `loopos.load` opens it. Raises `loopos.UserError` if there is
        none yet.
        """
        return opened(str(self.folder))

    @property
    def report(self) -> Path:
        """The file report.md, with report.html beside it; written now if the run has none. Raises
        `loopos.UserError`.
        """
        file = self.folder / "report.md"
        if file.is_file() and self.state == "finished":
            return file
        from loopos.evaluation.report import write_report

        return write_report(self.folder)

    def _repr_html_(self) -> str:
        """What a notebook shows: state, outcome, and the metrics before and after training."""
        total = "" if self.total_steps is None else f" of {self.total_steps:,}"
        head = f"{self.method}, {self.step:,}{total} steps in {as_time(self.step_seconds)}; {self.ended}"
        lines = [f"<b>{html.escape(str(self.folder))}</b>: {html.escape(head)}"]
        lines += [html.escape(sentence) for sentence in (self.outcome.verdict(), _advice(self)) if sentence]
        names = list(once(self.metrics))
        rows = [
            f"<tr><td>{html.escape(name)}</td><td>{_cell(self.first_metrics.get(name))}</td>"
            f"<td>{_cell(self.metrics[name])}</td></tr>"
            for name in names[:_MOST_METRICS]
        ]
        if rows:
            title = f"<tr><th></th><th>before training</th><th>step {self.exported_step}</th></tr>"
            lines.append(f"<table>{title}{''.join(rows)}</table>")
        if len(names) > _MOST_METRICS:
            lines.append(f"and {len(names) - _MOST_METRICS} more in <code>metrics</code>")
        return "<div>" + "<br>".join(lines) + "</div>"


def opened(source: str, kind: Kind | None = None, *, device: str = "auto") -> Opened:
    """The model at a path or id, as `loopos.load` opens it."""
    from loopos.evaluation.opening import open_model
    from loopos.models.quiet import quiet_libraries
    from loopos.training.precision import pick_device

    with quiet_libraries():
        return open_model(source, kind, device=pick_device(device).type)


def _logged_result(run: RunFolder) -> FitResult:
    """The result of a run that has ended, from its log."""
    if run.ended_by is None:
        raise UserError(f"{run.folder}: the run has no result: it is {run.status}; expected a run that has ended")
    from loopos.training.run_state import FitResult

    outcome, steps = run.outcome, [event for event in run.events if event["event"] == "step"]
    ends = [event for event in run.events if event["event"] == "end"]
    best, trained, start = outcome.best, outcome.best_trained, outcome.start
    return FitResult(
        step=run.step,
        stopped_by=run.ended_by,
        best_step=None if best is None else best.step,
        best_metric=None if best is None else best.of(outcome.metric),
        tokens=int(steps[-1]["metrics"]["tokens"]) if steps else 0,
        seconds=float(ends[-1]["timing"]["seconds"]),
        best_trained_step=None if trained is None else trained.step,
        best_trained_metric=None if trained is None else trained.of(outcome.metric),
        start_metric=None if start is None else start.of(outcome.metric),
        beat_start=outcome.beat_start,
    )


def _advice(run: RunFolder) -> str:
    """What to do with the run as it is."""
    if run.state in ("interrupted", "killed", "failed"):
        return "continue it: the same call of loopos.train with resume=True"
    return "" if run.has_model else "no model yet"


def _cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return figure(value)
    return "" if value is None else html.escape(str(value))
