"""`loopos.Run`: what a training returns is what its folder says, wherever it was trained."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from pico_runs import class_rows, write_jsonl

import loopos
from loopos.storage.events import fingerprint

OF_RESULT = [field.name for field in dataclasses.fields(loopos.FitResult)]


def config_of(folder: Path, pico_folder: Path, **training: Any) -> dict[str, Any]:
    settings = {"learning_rate": 0.01, "num_epochs": 2, "batch_size": 4, "precision": "fp32", "device": "cpu"}
    return {
        "computation": {"mode": "posttraining", "method": "fine_tuning"},
        "training": {**settings, "optimizer": "adamw", **training},
        "data": {"pretrained_weights": str(pico_folder), "output_dir": str(folder)},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> loopos.Run:
    folder = tmp_path_factory.mktemp("trained") / "run"
    return loopos.train(config_of(folder, pico_folder), data=class_rows(24), quiet=True)


def test_a_training_returns_its_run(trained: loopos.Run) -> None:
    assert isinstance(trained, loopos.Run)
    assert isinstance(trained.result, loopos.FitResult)
    assert (trained.step, trained.stopped_by, trained.interrupted, trained.state) == (12, "epochs", False, "finished")
    assert {name: getattr(trained, name) for name in OF_RESULT} == dataclasses.asdict(trained.result)
    assert trained.method == "fine_tuning"


def test_a_run_that_is_opened_has_the_result_of_its_training(trained: loopos.Run) -> None:
    again = loopos.Run(str(trained.folder))
    assert again.result == trained.result
    assert again.result is not trained.result
    assert again.metrics == trained.metrics
    # Those of the best step, as `loopos runs list` shows them.
    assert again.metrics["accuracy"] == trained.best_metric
    assert repr(again) == f"Run({str(trained.folder)!r})"


@pytest.mark.parametrize(
    ("training", "stopped_by", "has_best"),
    [({"max_steps": 3, "validate_every": 2}, "max_steps", True), ({"validate_every": "never"}, "epochs", False)],
)
def test_the_log_holds_every_result(
    training: dict[str, Any], stopped_by: str, has_best: bool, pico_folder: Path, tmp_path: Path
) -> None:
    run = loopos.train(config_of(tmp_path / "run", pico_folder, **training), data=class_rows(24), quiet=True)
    assert run.result.stopped_by == stopped_by
    assert (run.result.best_trained_step is not None) == has_best
    assert loopos.Run(run.folder).result == run.result


def test_history_is_every_logged_step_and_validation(trained: loopos.Run) -> None:
    steps = [row for row in trained.history if row["event"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["step"] for row in trained.history if row["event"] == "validation"] == [0, 6, 12]
    assert steps[-1]["loss"] < steps[0]["loss"]
    frame = trained.to_pandas()
    assert len(frame) == 15
    assert frame[frame.event == "step"]["loss"].tolist() == [row["loss"] for row in steps]
    assert {"accuracy", "learning_rate", "seconds", "tokens_per_second"} <= set(frame.columns)


def test_the_model_is_opened_once(trained: loopos.Run) -> None:
    texts = ["good film", "bad parcel"]
    assert trained.model is trained.model
    assert trained.model.predict(texts) == loopos.load(trained, "head").predict(texts)


def test_a_text_alone_is_not_read_by_the_character(trained: loopos.Run) -> None:
    with pytest.raises(loopos.UserError, match=r"texts: got the text 'good film'; expected a list of texts"):
        trained.model.predict("good film")


def test_a_language_run_has_samples(pico_folder: Path, tmp_path: Path) -> None:
    problems = [{"problem": f"add {i} and 2", "answer": str(i + 2)} for i in range(12)]
    run = loopos.train(
        {
            "computation": {"mode": "posttraining", "method": "chain_of_thought"},
            "training": {"learning_rate": 1e-3, "batch_size": 4, "num_epochs": 1, "device": "cpu", "precision": "fp32"},
            "generation": {"max_new_tokens": 4},
            "evaluation": {"problems": 2, "samples": 2},
            "data": {
                "pretrained_weights": str(pico_folder),
                "output_dir": str(tmp_path / "run"),
                "reasoning_examples": problems,
                "validation_data": problems[:3],
            },
        },
        quiet=True,
    )
    assert [sample["step"] for sample in run.samples] == [0, 0, 3, 3]
    assert [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()] == run.samples
    assert (
        loopos.generate(run, "add 3 and 2", max_new_tokens=4)
        == run.model.generate(["add 3 and 2"], loopos.SamplingParams(max_new_tokens=4))[0]
    )


def test_a_notebook_shows_state_and_metrics(trained: loopos.Run, tmp_path: Path, pico_folder: Path) -> None:
    shown = trained._repr_html_()
    assert "fine_tuning, 12 of 12 steps" in shown
    assert f"<td>accuracy</td><td>{trained.first_metrics['accuracy']:.4g}</td>" in shown
    assert "no model yet" not in shown
    name = tmp_path / "<b>run"
    cut = loopos.train(
        config_of(name, pico_folder), data=class_rows(24), quiet=True, callbacks=[_interrupt_at(2)]
    )  # fmt: skip
    assert "&lt;b&gt;run" in cut._repr_html_()
    assert "interrupted by Ctrl-C<br>" in cut._repr_html_()
    assert "with resume=True" in cut._repr_html_()


def _interrupt_at(step: int) -> Any:
    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return interrupt


def test_an_interrupted_training_returns_and_resumes_exactly(pico_folder: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", class_rows(24))
    first, second = (
        {**config, "data": {**config["data"], "training_data": str(rows)}}
        for config in (config_of(tmp_path / name, pico_folder) for name in ("whole", "cut"))
    )
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    loopos.train(first, quiet=True)
    cut = loopos.train(second, quiet=True, callbacks=[_interrupt_at(8)])
    assert (cut.step, cut.stopped_by, cut.interrupted, cut.state) == (8, "SIGINT", True, "interrupted")
    assert (cut.folder / "checkpoints" / "step-00000008").is_dir()
    with pytest.raises(loopos.UserError, match="this run has no finished model yet"):
        _ = cut.model
    assert loopos.Run(cut.folder).result == cut.result
    resumed = loopos.train(second, resume=True, quiet=True)
    assert (resumed.step, resumed.interrupted) == (12, False)
    assert handlers == [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    ]
    whole, events = (
        [event["metrics"] for event in loopos.Run(tmp_path / name).events if event["event"] in ("step", "validation")]
        for name in ("whole", "cut")
    )
    assert events == whole


def test_a_thread_trains_as_the_main_thread_does(trained: loopos.Run, pico_folder: Path, tmp_path: Path) -> None:
    found: list[loopos.Run] = []
    rows = class_rows(24)

    def work() -> None:
        found.append(loopos.train(config_of(tmp_path / "run", pico_folder), data=rows, quiet=True))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    [run] = found
    assert fingerprint(run.folder / "events.jsonl") == fingerprint(trained.folder / "events.jsonl")


def test_a_run_that_is_going_is_read_as_it_is(pico_folder: Path, tmp_path: Path) -> None:
    seen: list[loopos.Run] = []

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            seen.append(loopos.Run(tmp_path / "run"))
            assert seen[0].state == "running"

    loopos.train(config_of(tmp_path / "run", pico_folder), data=class_rows(24), quiet=True, callbacks=[look])
    [run] = seen
    assert (run.step, len(run.history)) == (3, 4)
    with pytest.raises(loopos.UserError, match="the run has no result: it is running"):
        _ = run.result


def test_the_report_is_written_where_there_is_none(trained: loopos.Run) -> None:
    assert trained.report == trained.folder / "report.md"
    trained.report.unlink()
    assert "Finished all 2 epochs" in loopos.Run(trained.folder).report.read_text(encoding="utf-8")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(loopos.UserError, match="no such folder"):
        loopos.Run(tmp_path / "nowhere")
    with pytest.raises(loopos.UserError, match=r"no run: no config\.json"):
        loopos.Run(tmp_path)
