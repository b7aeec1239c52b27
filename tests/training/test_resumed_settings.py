"""What a resumed run must not change, what it may change and how that is reported, and foreign logs and states."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest
import torch
from pico_runs import class_rows, config_of, events_of, last_weights, train

from loopos.config.diagnostics import UserError
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.sections import TrainingSection
from loopos.evaluation.run_folder import read_run
from loopos.training import checkpoint
from loopos.training.checkpoint_files import read_manifest, seal_folder
from loopos.training.fit import FitResult
from loopos.training.identity import compare, setting
from loopos.training.progress import write_samples
from loopos.training.random_states import random_states, restore_random_states
from loopos.training.validation import Validation, ValidationTracker

Run = Callable[..., tuple[FitResult, Path]]
ROWS = class_rows(24, ["bad", "fair", "good"])
DATA = {"validation_share": 1 / 6}
TRAINING = {"learning_rate": 0.003, "num_epochs": 4, "max_steps": 2, "max_length": 64}
MODEL = {"labels": ["bad", "fair", "good"]}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """The folder of a run of two steps, which its tests copy."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(config_of(folder, pico_folder, ROWS, training=TRAINING, model=MODEL, data=DATA))
    return folder


@pytest.fixture
def copied(first_run: Path, tmp_path: Path) -> Path:
    """A copy of that run, in a folder of its own."""
    return Path(shutil.copytree(first_run, tmp_path / "run"))


def resume(
    folder: Path,
    weights: Path,
    *,
    rows: list[dict[str, Any]] = ROWS,
    model: Mapping[str, Any] = MODEL,
    data: Mapping[str, Any] | None = None,
    **training: Any,
) -> FitResult:
    settings = {**TRAINING, **training}
    # The path stays the same; only the file's content changes.
    config = config_of(folder, weights, rows, training=settings, model=model, data={**DATA, **(data or {})})
    return train(config, resume=True)


def rotated(label: str) -> str:
    return {"bad": "fair", "fair": "good", "good": "bad"}[label]


OTHER_ROWS: dict[str, list[dict[str, Any]]] = {
    "texts replaced": [{**row, "text": row["text"].replace("late", "soon")} for row in ROWS],
    "labels rotated": [{**row, "label": rotated(row["label"])} for row in ROWS],
    "order reversed": ROWS[::-1],
}


def is_unchanged(folder: Path, first_run: Path) -> bool:
    files = [file for file in first_run.rglob("*") if file.is_file()]
    assert len(files) > 10
    return all((folder / file.relative_to(first_run)).read_bytes() == file.read_bytes() for file in files)


@pytest.mark.parametrize("change", OTHER_ROWS)
def test_other_rows_of_the_same_number_are_refused(
    change: str, copied: Path, first_run: Path, pico_folder: Path
) -> None:
    with pytest.raises(UserError, match=r"data\.training_data: the encoded rows differ from those of the run \(digest"):
        resume(copied, pico_folder, rows=OTHER_ROWS[change], data={"training_data": str(renamed(first_run, change))})
    assert is_unchanged(copied, first_run)


def renamed(first_run: Path, change: str) -> Path:
    """The file of the run's rows, temporarily with other content."""
    file = first_run.parent / f"{change}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in OTHER_ROWS[change]))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"labels": ["good", "fair", "bad"]}}, "model.labels: was [bad, fair, good], is [good, fair, bad]"),
        ({"model": {**MODEL, "pooling": "mean"}}, "model.pooling: was last, is mean"),
        ({"model": {**MODEL, "label_smoothing": 0.1}}, "model.label_smoothing: was 0.0, is 0.1"),
        ({"model": {**MODEL, "class_weights": "balanced"}}, "model.class_weights: was null, is balanced"),
        ({"max_length": 63}, "training.max_length: was 64, is 63"),
        ({"batch_size": 4}, "training.batch_size: was 8, is 4"),
        ({"seed": 6}, "training.seed: was 5, is 6"),
        ({"data": {"max_rows": 18}}, "training rows: were 20, are 15"),
        ({"optimizer": "sgd"}, "training.optimizer: was adamw, is sgd"),
    ],
)
def test_another_meaning_is_refused_by_key(
    change: dict[str, Any], message: str, copied: Path, first_run: Path, pico_folder: Path
) -> None:
    with pytest.raises(UserError) as refused:
        resume(copied, pico_folder, **change)
    assert f"\n  {message}\n" in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 6
    assert is_unchanged(copied, first_run)


def test_a_class_that_is_renamed_is_refused(tmp_path: Path, pico_folder: Path) -> None:
    train(config_of(tmp_path / "run", pico_folder, ROWS, training=TRAINING, data=DATA))
    rows = [{**row, "label": {"good": "great"}.get(row["label"], row["label"])} for row in ROWS]
    with pytest.raises(UserError, match=r"model\.labels: was \[bad, fair, good\], is \[bad, fair, great\]\n"):
        resume(tmp_path / "run", pico_folder, rows=rows, model={})


def test_another_tokenizer_is_refused(copied: Path, pico_folder: Path) -> None:
    # The same ids, read by other tokens: two of the vocabulary that these rows do not hold change places.
    tokenizer = Path(shutil.copytree(pico_folder, copied.parent / "tokenizer"))
    content = (tokenizer / "tokenizer.json").read_text()
    one, two = '"#": ', '"%": '
    assert one in content
    assert two in content
    (tokenizer / "tokenizer.json").write_text(content.replace(one, '"@@": ').replace(two, one).replace('"@@": ', two))
    with pytest.raises(UserError, match=r"data\.tokenizer: was null, is \S+tokenizer\n"):
        resume(copied, pico_folder, data={"tokenizer": str(tokenizer)})


CHANGES: dict[str, tuple[Any, Any, Any]] = {
    "learning_rate": (0.005, 0.003, 0.005),
    "schedule": ("cosine", "constant", "cosine"),
    "betas": ([0.8, 0.99], [0.9, 0.999], [0.8, 0.99]),
    "weight_decay": (0.1, 0.0, 0.1),
    "max_grad_norm": (2.0, 1.0, 2.0),
    "metric": ("macro_f1", None, "macro_f1"),
    "num_epochs": (3, 4, 3),
    "max_steps": (4, 2, 4),
    "validate_every": (1, "epoch", 1),
}


def test_settings_that_may_change_are_reported_one_by_one_and_applied(
    copied: Path, pico_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = resume(copied, pico_folder, **{key: value for key, (value, _, _) in CHANGES.items()})
    assert result.step == 4
    lines = capsys.readouterr().err.splitlines()
    for line in (
        "training.learning_rate: was 0.003, is 0.005",
        "training.schedule: was constant, is cosine",
        "training.betas: was [0.9, 0.999], is [0.8, 0.99]",
        "training.weight_decay: was 0.0, is 0.1",
        "training.max_grad_norm: was 1.0, is 2.0",
        "training.metric: was null, is macro_f1",
        "training.num_epochs: was 4, is 3",
        "training.max_steps: was 2, is 4",
        "training.validate_every: was epoch, is 1",
        "the metric or the validation rows have changed: the comparison of validations starts anew",
    ):
        assert lines.count(line) == 1, line
    first, second = [event["metrics"] for event in events_of(copied, "session")]
    assert first["changed"] == {}
    changes = {f"training.{key}": [was, now] for key, (_, was, now) in CHANGES.items()}
    assert {key: values for key, values in second["changed"].items() if key.startswith("training.")} == changes
    assert (first["settings"]["training"]["learning_rate"], second["settings"]["training"]["learning_rate"]) == (
        0.003,
        0.005,
    )
    assert json.loads((copied / "config.json").read_text()) == second["settings"]
    assert read_run(copied).setting_changes()["training.learning_rate"] == [(0, 0.003), (2, 0.005)]


def test_what_was_best_by_another_metric_is_not_compared_with() -> None:
    """An accuracy of 0.9 would let no loss above it be the best."""
    settings = TrainingSection.model_validate({"learning_rate": 0.1, "early_stopping": {"patience": 2}})

    def tracker(metric: str, mode: Literal["min", "max"]) -> ValidationTracker:
        return ValidationTracker(Validation(dict, metric, mode, metric, mode), settings)

    before, after, same = tracker("accuracy", "max"), tracker("loss", "min"), tracker("accuracy", "max")
    assert before.observe({"accuracy": 0.9, "loss": 1.5}, 1)
    assert not before.observe({"accuracy": 0.9, "loss": 1.5}, 2)
    after.load(before.state())
    assert after.observe({"accuracy": 0.9, "loss": 1.2}, 3)
    assert not after.gives_up
    assert same.load(before.state()) == []
    assert (same.best.metric, same.best.step) == (0.9, 1)
    assert not same.observe({"accuracy": 0.9}, 3)
    assert same.gives_up


def test_a_change_of_a_session_that_left_no_checkpoint_is_no_change(
    copied: Path, pico_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings are compared with those of the checkpoint's session, not with the newest config.json."""
    config = json.loads((copied / "config.json").read_text())
    config["training"]["learning_rate"] = 9.0
    (copied / "config.json").write_text(json.dumps(config))
    resume(copied, pico_folder)
    assert "learning_rate" not in capsys.readouterr().err


def as_of_an_older_version(folder: Path) -> None:
    """The run as written by a version without digests."""
    last = max((folder / "checkpoints").glob("step-*"))
    manifest, state = read_manifest(last), json.loads((last / "state.json").read_text())
    old = ("base", "rows", "rows_a_step", "weights that train")
    old += ("training.optimizer", "training.seed", "training.shuffle")
    state["identity"] = {name: value for name, value in state["identity"].items() if name in old}
    del state["events_sha256"], state["judges"]["judged_by"], state["judges"]["watched_by"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for event in events:
        event["metrics"].pop("settings", None)
        event["metrics"].pop("changed", None)
    lines = [json.dumps(event, separators=(",", ":")) + "\n" for event in events]
    index = next(number for number, event in enumerate(events) if event["event"] == "checkpoint")
    state["events_offset"] = sum(map(len, lines[:index]))
    (folder / "events.jsonl").write_text("".join(lines))
    for name in ("state.json", "manifest.json"):
        (last / name).unlink()
    records = {name: record for name, record in manifest["files"].items() if name != "state.json"}
    facts = {name: manifest[name] for name in ("step", "metric", "is_best")}
    seal_folder(last, records, json.dumps(state, sort_keys=True).encode(), facts)


def test_a_run_of_an_older_version_resumes_with_one_line(
    copied: Path, pico_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_of_an_older_version(copied)
    with pytest.raises(UserError, match=r"model\.pooling: was last, is mean\n"):
        resume(copied, pico_folder, model={**MODEL, "pooling": "mean"})
    assert resume(copied, pico_folder, learning_rate=0.005).stopped_by == "max_steps"
    messages = [line for line in capsys.readouterr().err.splitlines() if " was " in line]
    learning_rate, unknown = (line for line in messages if "data.training_data" not in line)
    assert learning_rate == "training.learning_rate: was 0.003, is 0.005"
    assert unknown.startswith(
        "this run was started by an older version, whose checkpoints do not record computation.method, "
    )
    assert "training rows, data.tokenizer" in unknown


# A log and states that are not the run's ---------------------------------------------------------------------------


def flip(file: Path, old: str, new: str) -> None:
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new, 1))


def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr("loopos.training.fit.Fit._step", step)


@pytest.mark.parametrize(("old", "new"), [('"step":1', '"step";1'), ('"timing"', '"timinh"')])
def test_a_broken_event_ends_the_run_at_its_start(
    old: str, new: str, copied: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_step(monkeypatch)
    flip(copied / "events.jsonl", old, new)
    with pytest.raises(UserError, match=r"events\.jsonl:\d: not an event"):
        resume(copied, pico_folder, max_steps=4)


def test_a_number_that_was_changed_in_the_log_is_reported(
    copied: Path, pico_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(copied / "events.jsonl", '"rows":8,', '"rows":9,')
    resume(copied, pico_folder)
    messages = [line for line in capsys.readouterr().err.splitlines() if "SHA-256" in line]
    assert len(messages) == 1
    assert "are not what the run wrote" in messages[0]


@pytest.mark.parametrize(
    ("group", "change"),
    [
        ("torch_cpu", lambda states: {**states, "torch_cpu": states["torch_cpu"][:-8].clone()}),
        ("python", lambda states: {**states, "python": states["python"][:-1].clone()}),
        ("numpy", lambda states: {**states, "numpy": states["numpy"][:-1].clone()}),
    ],
)
def test_random_states_of_another_version_are_one_line(group: str, change: Any) -> None:
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    tensors, state = random_states()
    try:
        lines = restore_random_states(change(tensors), state)
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.set_rng_state(before[2])
    assert len(lines) == 1
    assert lines[0].startswith(f"the random state of {group} in the checkpoint is not one of this version")


def test_broken_samples_are_named(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    write_samples(file, 1, [{"response": "one\u2028line"}])
    write_samples(file, 2, [{"response": "two"}])
    assert [json.loads(line)["step"] for line in file.read_text().split("\n") if line] == [1, 2]
    flip(file, '"step": 1', '"step"; 1')
    with pytest.raises(UserError, match=r"samples\.jsonl:1: not a sample of this run"):
        write_samples(file, 3, [])


# What killed processes left ----------------------------------------------------------------------------------------


def test_what_a_kill_left_among_the_checkpoints_is_cleared_at_the_next_start(run: Run) -> None:
    _, folder = run(save_every=2, keep_last=9, keep_best=False, max_steps=6)
    checkpoints = folder / "checkpoints"
    # As a kill in or before the pruning of the last save leaves them; the process's number is another one's by now.
    (checkpoints / ".step-00000001.removed-1").mkdir()
    (checkpoints / ".step-00000009.partial-1").mkdir()
    run(resume=True, save_every=2, keep_last=1, keep_best=False, max_steps=6)
    assert [entry.name for entry in checkpoints.iterdir()] == ["step-00000006"]


def test_the_checkpoint_that_a_damaged_one_falls_back_to_is_not_cleared(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = run(save_every=2, keep_last=9, keep_best=False, max_steps=6)
    weights = folder / "checkpoints" / "step-00000006" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    no_step(monkeypatch)
    with pytest.raises(AssertionError, match="a step was taken"):
        run(resume=True, save_every=2, keep_last=1, keep_best=False, max_steps=6)
    assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    found, _ = checkpoint.newest_whole(folder / "checkpoints")
    assert found is not None
    assert found.step == 4


def test_save_interval_bounds_the_time_between_checkpoints(run: Run) -> None:
    validates = {"validate_every": "never", "keep_last": 99, "max_steps": 4}
    _, folder = run(save_interval=1e-9, **validates)
    assert [event["step"] for event in events_of(folder, "checkpoint")] == [1, 2, 3, 4]
    _, folder = run("never", save_interval=1e-9, save_every="never", **validates)
    assert [event["step"] for event in events_of(folder, "checkpoint")] == [4]


def test_every_file_of_a_run_has_the_mode_of_the_umask(first_run: Path) -> None:
    written = [path for path in first_run.rglob("*") if path.is_file() and "model" not in path.parts]
    assert len(written) >= 6
    assert {path.stat().st_mode & 0o777 for path in written} == {0o644}


def test_a_checkpoint_is_no_model_and_the_error_explains_how_to_get_one(copied: Path, pico_folder: Path) -> None:
    from loopos.cli.opened_models import is_task_model
    from loopos.models.resolve import resolve

    for path in (copied / "checkpoints" / "step-00000002", copied / "checkpoints"):
        for opened in (is_task_model, resolve):
            with pytest.raises(UserError, match=r"not a model; .* loopos train CONFIG --resume training\.max_steps=2"):
                opened(str(path))
    shutil.rmtree(copied / "model")
    config = config_of(copied, pico_folder, ROWS, training={**TRAINING, "max_steps": 2}, model=MODEL, data=DATA)
    assert train(config, resume=True).step == 2
    assert (copied / "model" / "loopos.json").is_file()


def test_runs_of_older_versions_had_the_former_value() -> None:
    """A checkpoint that does not record a trait with a former value had that value, and neither warns nor hides it."""
    for value, refused in (("ppo", []), ("reinforce", ["training.algorithm: was ppo, is reinforce"])):
        found = compare({}, setting("training.algorithm", value, if_absent="ppo"), {})
        assert (found.refused, found.unknown) == (refused, [])
    assert compare({}, setting("training.seed", 3), {}).unknown == ["training.seed"]


def test_a_run_from_when_other_defaults_held_keeps_them(tmp_path: Path, pico_folder: Path) -> None:
    """The config names neither optimizer nor schedule. A new run has the defaults of today; one that began with SGD at a
    constant rate ends as one that names them.
    """
    before = {"optimizer": "sgd", "schedule": "constant", "warmup": 0}

    def trained(name: str, *, resume: bool = False, **training: Any) -> Path:
        settings = {"learning_rate": 0.05, "num_epochs": 2, **training}
        named = config_of(tmp_path / name, pico_folder, ROWS, training=settings, model=MODEL, data=DATA)
        sections = named.model_dump(exclude_unset=True)
        for key in before.keys() - training.keys():
            del sections["training"][key]
        train(FineTuningConfig.model_validate(sections), resume=resume)
        return tmp_path / name

    def recorded(run: Path) -> dict[str, Any]:
        settings = json.loads((run / "config.json").read_text())["training"]
        return {key: settings[key] for key in before}

    whole, new = trained("whole", **before), trained("new")
    assert recorded(whole) == before
    assert recorded(new) == {"optimizer": "adamw", "schedule": "cosine", "warmup": 0.05}
    trained("old", **before, max_steps=3)
    old = trained("old", resume=True)
    assert recorded(old) == before
    weights, expected = last_weights(old), last_weights(whole)
    assert all(weights[name].equal(expected[name]) for name in expected)
    assert not all(weights[name].equal(each) for name, each in last_weights(new).items())
