"""The report of a run: figures of hand-made events, curves, odd runs, equal bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import UserError
from loopos.evaluation.blocks import inline_svg
from loopos.evaluation.report import write_report

pytestmark = pytest.mark.usefixtures("drawn")

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
    event("validation", 0, {"loss": 1.2, "accuracy": 0.8, "log_loss": 1.0, "best": False}),
    event("step", 1, {"loss": 2.0, "learning_rate": 1e-5, "gradient_norm": 4.0}, seconds=1.0, time=1e9),
    event("step", 2, {"loss": 1.5, "learning_rate": 5e-6, "gradient_norm": 3.0}, seconds=3.0, time=1e9),
    event("validation", 2, {"loss": 1.25, "accuracy": 0.75, "log_loss": 1.0, "best": True, "best_trained": True}),
    event("step", 3, {"loss": 1.0, "learning_rate": 2e-6, "gradient_norm": 2.0}, seconds=8.0, time=1e9),
    event("validation", 3, {"loss": 1.5, "accuracy": 0.75, "log_loss": 2.0}),
    event("confusion", 2, {"class_names": ["old"], "matrix": [[9]]}),
    event("confusion", 3, {"class_names": ["pay", "a|b", "two\nlines"], "matrix": [[5, 1, 0], [0, 7, 2], [0, 0, 3]]}),
]


def lines_of(run: Path) -> list[str]:
    assert write_report(run) == run / "report.md"
    return (run / "report.md").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def usual_run(tmp_path_factory: pytest.TempPathFactory, drawn: None) -> Path:
    run = make_run(tmp_path_factory.mktemp("usual") / "my_run", USUAL)
    write_report(run)
    return run


def test_figures_of_a_usual_run(usual_run: Path) -> None:
    lines = (usual_run / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Run my_run"
    assert lines[2] == "Ten intents"
    for expected in (
        "| computation.method | fine_tuning |",
        "| data.pretrained_weights | a\\|b.bin |",
        "| training.learning_rate | 1e-05 |",
        # 16 is the default batch size, sgd the default optimizer: they say nothing.
        "| optimizer steps | 3 |",
        "| training loss, first | 2 (step 1) |",
        "| training loss, last | 1 (step 3) |",
        "| seconds a step, median | 3 |",
        "Still running, or killed.",
        "Training did not beat the start: accuracy is 0.75 at best (step 2) and was 0.8 before training.".join(
            ["**"] * 2
        ),
        # Of equal values the first is the best one.
        "| accuracy (decides) | max | 0.8 | 0.75 | 2 | 0.75 |",
        "| loss | min | 1.2 | 1.25 | 2 | 1.25 |",
        "| log_loss | min | 1 | 1 | 2 | 1 |",
        "| step | loss | accuracy | log_loss |",
        "| 2 | 1.25 | 0.75 | 1 |",
        "| 3 | 1.5 | 0.75 | 2 |",
        # Of 6, 9 and 3 rows 5, 7 and 3 are right; 5, 8 and 5 are predicted.
        "| class | rows | predicted | precision | recall | F1 |",
        "| pay | 6 | 5 | 1.000 | 0.833 | 0.909 |",
        "| a\\|b | 9 | 8 | 0.875 | 0.778 | 0.824 |",
        "| two lines | 3 | 5 | 0.600 | 1.000 | 0.750 |",
        "| true class | pay | a\\|b | two lines |",
        "| a\\|b | 0 | 7 | 2 |",
        "![validation](curves/validation.svg)",
        "![Row: true class. Column: predicted.](curves/confusion.svg)",
    ):
        assert lines.count(expected) == 1, expected
    text = "\n".join(lines)
    assert "validation_data" not in text
    assert "batch_size" not in text
    assert "old" not in text
    assert "events" not in text


def test_curves_are_drawn_and_named_in_the_report(usual_run: Path) -> None:
    run = usual_run
    lines = (run / "report.md").read_text(encoding="utf-8").splitlines()
    names = ["confusion.svg", "gradient_norm.svg", "learning_rate.svg", "loss.svg", "validation.svg"]
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


@pytest.mark.slow
def test_equal_events_give_equal_bytes(tmp_path: Path, usual_run: Path) -> None:
    first, second = usual_run, make_run(tmp_path / "my_run", USUAL)
    write_report(second)
    names = [
        "report.md",
        "report.html",
        *(f"curves/{name}.svg" for name in ("loss", "learning_rate", "gradient_norm", "validation")),
    ]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path, [event("step", 1, {})])
    assert "| optimizer steps | 1 |" in lines_of(run)
    make_run(tmp_path, [event("step", 3, {})])
    assert "| optimizer steps | 3 |" in lines_of(run)
    assert not [file for file in tmp_path.iterdir() if "partial" in file.name]


def test_a_run_without_events(tmp_path: Path) -> None:
    lines = lines_of(make_run(tmp_path, [], config={"computation": {"method": "fine_tuning"}}))
    assert "| optimizer steps | 0 |" in lines
    assert [line for line in lines if line.startswith("## ")] == ["## Summary", "## Settings"]


def test_values_that_are_not_finite_are_shown_and_never_best(tmp_path: Path) -> None:
    events = [
        event("step", 1, {"loss": "nan", "learning_rate": 1.0}),
        event("validation", 1, {"loss": "inf", "accuracy": "nan"}),
        event("validation", 2, {"loss": 0.5, "accuracy": "nan", "note": "text"}),
    ]
    lines = lines_of(make_run(tmp_path, events))
    assert "| training loss, last | nan (step 1) |" in lines
    assert "| 1 | inf | nan |" in lines
    assert "| loss | min |  | 0.5 | 2 | 0.5 |" in lines
    assert "| accuracy (decides) | max |  |  |  | nan |" in lines
    assert not [line for line in lines if "note" in line]


def test_a_metric_that_is_sometimes_absent_leaves_a_blank(tmp_path: Path) -> None:
    events = [event("validation", 1, {"loss": 1.0}), event("validation", 2, {"loss": 2.0, "auroc": 0.5})]
    lines = lines_of(make_run(tmp_path, events))
    assert "| 1 | 1 |  |" in lines
    assert "| 2 | 2 | 0.5 |" in lines


def test_many_validations_are_thinned_and_the_last_is_kept(tmp_path: Path) -> None:
    lines = lines_of(make_run(tmp_path, [event("validation", step, {"loss": 1 / step}) for step in range(1, 101)]))
    assert "34 of 100 validations." in lines
    listed = [
        int(line.split("|")[1]) for line in lines if line.count("|") == 3 and line.split("|")[1].strip().isdigit()
    ]
    assert listed == list(range(1, 101, 3))


def test_many_classes_give_the_largest_confusions(tmp_path: Path) -> None:
    matrix = [[100 if row == column else 0 for column in range(40)] for row in range(40)]
    matrix[3][7], matrix[8][1] = 2, 5
    metrics = {"class_names": [f"class {index}" for index in range(40)], "matrix": matrix}
    lines = lines_of(make_run(tmp_path, [event("confusion", 9, metrics)]))
    start = lines.index("40 classes: the 2 largest of 2 confusions.")
    assert lines[start + 4 :] == ["| class 8 | class 1 | 5 |", "| class 3 | class 7 | 2 |"]


def test_a_torn_last_line_is_left_out_and_a_broken_one_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, [event("step", 3, {})])
    whole = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text(whole + '{"event": "st')
    assert "| optimizer steps | 3 |" in lines_of(run)
    (run / "events.jsonl").write_text("{}{\n" + whole)
    with pytest.raises(UserError, match=r"events\.jsonl:1: not an event"):
        write_report(run)


@pytest.mark.parametrize("name", ["events.jsonl", "config.json"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, USUAL)
    (run / name).unlink()
    with pytest.raises(UserError, match=name):
        write_report(run)


@pytest.mark.slow
def test_the_report_needs_no_torch_and_no_display(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from pathlib import Path\nfrom loopos.evaluation.report import write_report\n"
        f"write_report(Path({str(make_run(tmp_path, USUAL[:3]))!r}))\n"
        "print([name for name in ('torch', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Page(HTMLParser):
    """What a page loads, its ids, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.loaded += [str(named[key]) for key in ("src", "href", "xlink:href", "data") if key in named]
        self.ids += [str(named["id"])] if "id" in named else []
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_page_holds_everything_and_needs_nothing(usual_run: Path) -> None:
    text = (usual_run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    # Only places within the page: no network, no file beside it.
    assert page.loaded
    assert {place[0] for place in page.loaded} == {"#"}
    assert {place[1:] for place in page.loaded} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg") == 5
    assert "<script" not in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert "Training did not beat the start" in text
    # What users wrote is text, not markup.
    assert "a|b" in page.cells


def test_text_of_users_is_escaped(tmp_path: Path) -> None:
    config = {**CONFIG, "description": "<script>alert(1)</script>"}
    run = make_run(
        tmp_path, [event("confusion", None, {"class_names": ["<b>", "&"], "matrix": [[1, 0], [0, 1]]})], config
    )
    write_report(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert Page(text).cells.count("<b>") == 2


def test_black_and_white_of_a_drawing_follow_the_page() -> None:
    svg = '<?xml?><svg><metadata>x</metadata><g id="a" style="fill: #ffffff; stroke: #000000"/><use href="#a"/></svg>'
    assert inline_svg(svg, "p1-") == (
        '<svg><g id="p1-a" style="fill: none; stroke: currentColor"/><use href="#p1-a"/></svg>'
    )


def test_a_regression_shows_its_errors(tmp_path: Path) -> None:
    points = {"rows": 5, "true": [1.0, 2.0, 3.0], "predicted": [1.5, 2.0, 1.0]}
    lines = lines_of(make_run(tmp_path, [event("residuals", None, points)]))
    assert "![residuals](curves/residuals.svg)" in lines
    assert "The first 3 of 5 rows. Median error 0.5, largest 2." in lines


def test_when_where_and_on_what_a_run_ran(tmp_path: Path) -> None:
    machine = {"processor": "A CPU", "cores": 2, "threads": 4, "amx": True, "device": "cpu", "processes": 1}
    session = {
        "num_rows": {"training": 1200, "validation": 80},
        "total_steps": 9,
        "versions": {"python": "3.11.7", "loopos": "0.1.0", "torch": "2.13.0"},
        "machine": machine,
        "precision": "fp32",
    }
    events = [
        event("session", 0, session, time=1e9),
        event("step", 1, {"tokens": 500}, seconds=200.0, time=1e9 + 200),
        event("session", 1, session, time=1e9 + 500),
        event("step", 2, {"tokens": 1000}, seconds=100.0, time=1e9 + 700),
    ]
    lines = lines_of(make_run(tmp_path, events))
    begun = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(1e9))
    for expected in (
        f"| begun | {begun}, resumed 1 time |",
        "| time in steps, validations and saves | 5 min |",
        "| optimizer steps | 2 of 9 |",
        "| rows trained on | 1,200 |",
        "| rows validated on | 80 |",
        "| tokens trained on | 1,000 |",
        "| versions | python 3.11.7, loopos 0.1.0, torch 2.13.0 |",
        "| machine | A CPU, 2 cores, 4 threads, AMX |",
    ):
        assert expected in lines, expected


def test_chats_of_the_last_validation_are_shown_beside_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path, [event("step", 4, {})])
    records = [
        {"step": step, "prompt": "hi <you>", "reference": "hello", "response": summary}
        for step, summary in ((0, "um"), (2, "hel"), (4, "hello!"))
    ]
    torn = '{"step": 6, "pro'
    (run / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records) + torn)
    lines = lines_of(run)
    assert "> hi <you>" in lines
    assert lines[-3:] == ["| before training |  | um |", "| step 4 |  | hello! |", "| in the data |  | hello |"]
