"""A trained pico run, made by the command line itself, and `invoke`, which runs a command in this process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loopos.cli.commands import app
from loopos.cli.process import SILENCE

Invoke = Callable[..., Any]
OPENINGS = ("good", "bad", "where")
ENDINGS = ("the parcel came late", "a kind answer", "my card was charged", "the film was slow", "cold food again")


def rows(number: int) -> list[dict[str, Any]]:
    """Short texts whose first word determines the class."""
    return [{"text": f"{OPENINGS[i % 3]} {ENDINGS[(i * 7) % 5]} {i}", "label": OPENINGS[i % 3]} for i in range(number)]


def write_jsonl(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """What a command sets for the libraries is not left behind."""
    before = {name: os.environ.get(name) for name in SILENCE}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def invoke() -> Invoke:
    """`invoke("train", "x.json")`: exit_code, stdout and stderr of a command. Exceptions of ours are raised."""
    runner = CliRunner()

    def run(*arguments: object, text: str | bytes | None = None) -> Any:
        return runner.invoke(app, [str(each) for each in arguments], input=text, catch_exceptions=False)

    return run


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """A folder with data and a config that trains the pico model for two epochs; `outputs/` is empty."""
    folder = tmp_path_factory.mktemp("project")
    write_jsonl(folder / "train.jsonl", rows(48))
    write_jsonl(folder / "test.jsonl", rows(12))
    config = {
        "model": {"num_classes": 3},
        "computation": {"mode": "posttraining", "method": "fine_tuning"},
        "training": {
            "learning_rate": 0.01,
            "optimizer": "adamw",
            "batch_size": 8,
            "num_epochs": 2,
            "precision": "fp32",
            "device": "cpu",
            "schedule": "constant",
            "warmup": 0,
        },
        "data": {
            "pretrained_weights": str(pico_folder),
            "training_data": str(folder / "train.jsonl"),
            "validation_data": str(folder / "test.jsonl"),
            "output_dir": str(folder / "outputs" / "first"),
        },
    }
    (folder / "run.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def trained(project: Path, invoke: Invoke) -> Any:
    """The result of `loopos train run.json --json`, which leaves the run outputs/first."""
    result = invoke("train", project / "run.json", "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="session")
def language_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """The folder of a chain-of-thought run whose model is random; its tokenizer holds the plain chat template."""
    import dataclasses

    from loopos.data.step_format import StepFormat
    from loopos.data.templates import ChatTemplate
    from loopos.models.folders import save_language_model
    from loopos.models.load import load_pretrained

    folder = tmp_path_factory.mktemp("language") / "run"
    pretrained = load_pretrained(str(pico_folder), causal=True)
    pretrained.tokenizer.chat_template = ChatTemplate(pretrained.tokenizer, "plain").source
    description = {
        "method": "chain_of_thought",
        "step_format": dataclasses.asdict(StepFormat()),
        "stop_tokens": [2],
        "precision": "fp32",
    }
    folder.mkdir()
    save_language_model(folder / "model", pretrained.model, pretrained.tokenizer, description)
    return folder


Reference = Callable[..., str]


@pytest.fixture(scope="session")
def greedy(language_run: Path) -> Reference:
    """`greedy(messages, 12)`: the greedy text of transformers for messages, or the continuation of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(language_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(language_run / "model")

    def text(asked: list[dict[str, str]] | str, most: int) -> str:
        if isinstance(asked, str):
            ids = tokenizer(asked, return_tensors="pt")["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        made = model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=most, do_sample=False)
        return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))

    return text
