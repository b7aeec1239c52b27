"""The report of a run: figures of hand-made events, curves, odd runs, equal bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from loopos.evaluation.report import write_report

CONFIG = {
    "description": "Ten intents",
    "model": {"task": "classification", "num_classes": 3},
    "computation": {"mode": "posttraining", "method": "fine_tuning"},
    "training": {"learning_rate": 1e-5, "batch_size": 16, "optimizer": "sgd", "max_steps": None},
    "data": {"pretrained_weights": "a|b.bin", "training_data": "train.csv", "validation_data": None},
}


def event(kind: str, step: int | None, metrics: dict[str, Any], **timing: Any) -> dict[str, Any]:
    return {"event": kind, "step": step, "metrics": metrics, "timing": timing}


def make_run(folder: Path, events: list[dict[str, Any]], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


USUAL = [
    event("session", None, {"torch": "2"}),
    event("step", 1, {"loss": 2.0, "learning_rate": 1e-5, "gradient_norm": 4.0}, seconds=1.0, time=1e9),
    event("step", 2, {"loss": 1.5, "learning_rate": 5e-6, "gradient_norm": 3.0}, seconds=3.0, time=1e9),
    event("validation", 2, {"loss": 1.25, "accuracy": 0.75, "log_loss": 1.0}),
    event("step", 3, {"loss": 1.0, "learning_rate": 2e-6, "gradient_norm": 2.0}, seconds=8.0, time=1e9),
    event("validation", 3, {"loss": 1.5, "accuracy": 0.75, "log_loss": 2.0}),
    event("confusion", 2, {"class_names": ["old"], "matrix": [[9]]}),
    event("confusion", 3, {"class_names": ["pay", "a|b", "two\nlines"], "matrix": [[5, 1, 0], [0, 7, 2], [0, 0, 3]]}),
]


def lines_of(run: Path) -> list[str]:
    assert write_report(run) == run / "report.md"
    return (run / "report.md").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def usual_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("usual") / "my_run", USUAL)
    write_report(run)
    return run


def test_figures_of_a_usual_run(usual_run: Path) -> None:
    lines = (usual_run / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Run my_run"
    assert lines[2] == "Ten intents"
    for expected in (
        "| computation.method | `fine_tuning` |",
        "| data.pretrained_weights | `a\\|b.bin` |",
        "| training.learning_rate | `1e-05` |",
        "| last step | 3 |",
        "| training loss, first | 2 (step 1) |",
        "| training loss, last | 1 (step 3) |",
        "| seconds, median of 3 steps | 3 |",
        "| events | 2 confusion, 1 session, 3 step, 2 validation |",
        # Of equal values the first is the best one.
        "| accuracy | max | 0.75 | 2 | 0.75 |",
        "| loss | min | 1.25 | 2 | 1.5 |",
        "| log_loss | min | 1 | 2 | 2 |",
        "| step | loss | accuracy | log_loss |",
        "| 2 | 1.25 | 0.75 | 1 |",
        "| 3 | 1.5 | 0.75 | 2 |",
        "Row: true class. Column: predicted class, step 3.",
        "|  | pay | a\\|b | two lines |",
        "| **a\\|b** | 0 | 7 | 2 |",
        "![validation](curves/validation.svg)",
    ):
        assert lines.count(expected) == 1, expected
    text = "\n".join(lines)
    assert "validation_data" not in text
    assert "old" not in text
    assert "time," not in text


def test_curves_are_drawn_and_named_in_the_report(usual_run: Path) -> None:
    run = usual_run
    lines = (run / "report.md").read_text(encoding="utf-8").splitlines()
    names = ["gradient_norm.svg", "learning_rate.svg", "loss.svg", "validation.svg"]
    assert sorted(path.name for path in (run / "curves").iterdir()) == names
    for name in names:
        drawing = (run / "curves" / name).read_text()
        assert xml.etree.ElementTree.fromstring(drawing).tag == "{http://www.w3.org/2000/svg}svg"
        assert "dc:date" not in drawing
        assert any(f"(curves/{name})" in line for line in lines)
    loss = (run / "curves" / "loss.svg").read_text()
    assert ">Loss<" in loss
    assert ">training<" in loss
    assert ">validation<" in loss
    panels = (run / "curves" / "validation.svg").read_text()
    assert all(f">{name}<" in panels for name in ("loss", "accuracy", "log_loss"))


def test_equal_events_give_equal_bytes(tmp_path: Path, usual_run: Path) -> None:
    first, second = usual_run, make_run(tmp_path / "my_run", USUAL)
    write_report(second)
    names = ["report.md", *(f"curves/{name}.svg" for name in ("loss", "learning_rate", "gradient_norm", "validation"))]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path, [event("step", 1, {})])
    assert "| last step | 1 |" in lines_of(run)
    make_run(tmp_path, [event("step", 3, {})])
    assert "| last step | 3 |" in lines_of(run)


def test_a_run_without_events(tmp_path: Path) -> None:
    lines = lines_of(make_run(tmp_path, [], config={"computation": {"method": "fine_tuning"}}))
    assert "| events | none |" in lines
    assert not [line for line in lines if line.startswith("## ") and line != "## Summary"]


def test_values_that_are_not_finite_are_shown_and_never_best(tmp_path: Path) -> None:
    events = [
        event("step", 1, {"loss": "nan", "learning_rate": 1.0}),
        event("validation", 1, {"loss": "inf", "accuracy": "nan"}),
        event("validation", 2, {"loss": 0.5, "accuracy": "nan", "note": "text"}),
    ]
    lines = lines_of(make_run(tmp_path, events))
    assert "| training loss, last | nan (step 1) |" in lines
    assert "| 1 | inf | nan |" in lines
    assert "| loss | min | 0.5 | 2 | 0.5 |" in lines
    assert not [line for line in lines if line.startswith("| accuracy") or "note" in line]


def test_a_metric_that_comes_and_goes_leaves_a_blank(tmp_path: Path) -> None:
    events = [event("validation", 1, {"loss": 1.0}), event("validation", 2, {"loss": 2.0, "auroc": 0.5})]
    lines = lines_of(make_run(tmp_path, events))
    assert "| 1 | 1 |  |" in lines
    assert "| 2 | 2 | 0.5 |" in lines


def test_many_validations_are_thinned_and_the_last_is_kept(tmp_path: Path) -> None:
    lines = lines_of(make_run(tmp_path, [event("validation", step, {"loss": 1 / step}) for step in range(1, 101)]))
    assert "34 of 100 validations: one in 3." in lines
    listed = [
        int(line.split("|")[1]) for line in lines if line.count("|") == 3 and line.split("|")[1].strip().isdigit()
    ]
    assert listed == list(range(1, 101, 3))


def test_many_classes_give_the_largest_confusions(tmp_path: Path) -> None:
    matrix = [[100 if row == column else 0 for column in range(40)] for row in range(40)]
    matrix[3][7], matrix[8][1] = 2, 5
    metrics = {"class_names": [f"class {index}" for index in range(40)], "matrix": matrix}
    lines = lines_of(make_run(tmp_path, [event("confusion", 9, metrics)]))
    start = lines.index("40 classes, step 9: the 2 largest of 2 confusions.")
    assert lines[start + 4 :] == ["| class 8 | class 1 | 5 |", "| class 3 | class 7 | 2 |"]


def test_a_torn_last_line_is_left_out_and_a_broken_one_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, [event("step", 3, {})])
    whole = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text(whole + '{"event": "st')
    assert "| last step | 3 |" in lines_of(run)
    (run / "events.jsonl").write_text("{}{\n" + whole)
    with pytest.raises(ValueError, match=r"events\.jsonl:1: not an event"):
        write_report(run)


@pytest.mark.parametrize("name", ["events.jsonl", "config.json"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, USUAL)
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        write_report(run)


def test_the_report_needs_no_torch_and_no_display(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from pathlib import Path\nfrom loopos.evaluation.report import write_report\n"
        f"write_report(Path({str(make_run(tmp_path, USUAL[:3]))!r}))\n"
        "print([name for name in ('torch', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
