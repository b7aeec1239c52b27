"""A quantized folder in every command that opens a model, and the messages of commands that cannot use it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import class_rows, config_of, slow_but, train
from safetensors.torch import load_file

from loopos.evaluation.predictor import Predictor
from loopos.evaluation.reward_predictor import RewardPredictor
from loopos.methods.reward_model import RewardModelTrainer
from loopos.serving.heads import ClassifyHead, HeadService, ScoreHead
from loopos.serving.limits import ServingLimits
from loopos.serving.metrics import ServingMetrics
from loopos.training.progress import RunProgress
from tests.cli.conftest import Invoke
from tests.preference_runs import comparisons, reward_config, write_rows
from tests.serving.conftest import command, served
from tests.serving.questions import CHAT, ask

Home = dict[str, Path]
DEVICE = ("--device", "cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path, language_run: Path, invoke: Invoke) -> Home:
    """A language model, a classifier and a reward model, quantized: the folder of each by its kind."""
    folder = tmp_path_factory.mktemp("quantized")
    train(config_of(folder / "classes", pico_folder, class_rows(16), training={"num_epochs": 1}))
    RewardModelTrainer(
        reward_config(folder / "rewards", pico_folder, training={"num_epochs": 1}), progress=RunProgress(quiet=True)
    ).train()
    runs = {"language": language_run, "head": folder / "classes", "reward": folder / "rewards"}
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loopos.compression.pipeline.NUM_RUNS", 1)
        patch.setattr("loopos.compression.pipeline.WRITTEN", 2)
        for kind, run in runs.items():
            made[kind] = folder / f"{kind}-small"
            result = invoke("quantize", run, "--method", "int4", "-o", made[kind])
            assert result.exit_code == 0, result.stderr
    return made


def test_a_language_model_generates_and_is_evaluated(home: Home, tmp_path: Path, invoke: Invoke) -> None:
    greedy = ("--max-new-tokens", 6, "--temperature", 0, *DEVICE)
    summary = invoke("generate", home["language"], "-p", "the film", "--raw", *greedy)
    assert summary.exit_code == 0, summary.stderr
    chatted = invoke("chat", home["language"], *greedy, text="the film\n")
    assert chatted.exit_code == 0, chatted.stderr
    assert chatted.stdout.strip()
    text = tmp_path / "text.txt"
    text.write_text("the parcel came late and the box was open. " * 20, encoding="utf-8")
    measured = invoke("evaluate", home["language"], text, "--window", 64, "--json", *DEVICE)
    assert json.loads(measured.stdout)["metrics"]["perplexity"] > 1, measured.stderr
    with command(home["language"], "--name", "small", "--max-rows", 3) as (server, _):
        body = {"model": "small", "max_tokens": 6, "temperature": 0}
        status, told, _ = ask(server, "/v1/completions", {**body, "prompt": "the film"})
        assert status == 200, told
        assert told["choices"][0]["text"].strip() == summary.stdout.strip()
        asked = [{"role": "user", "content": "the film"}]
        status, told, _ = ask(server, CHAT, {**body, "messages": asked})
        assert status == 200, told
        assert told["choices"][0]["message"]["content"].strip() == chatted.stdout.strip()
        status, told, _ = ask(server, "/v1/embeddings", {"model": "small", "input": "the film"})
        assert status == 200, told
        # More rows than kernels for codes take.
        status, told, _ = ask(server, "/v1/completions", {**body, "prompt": "the film", "n": 3, "temperature": 1})
        assert status == 200, told
        assert len(told["choices"]) == 3


def test_a_classifier_predicts(home: Home, tmp_path: Path, invoke: Invoke) -> None:
    predicted = invoke("predict", home["head"], "-", *DEVICE, text="good the parcel came late\n")
    assert predicted.exit_code == 0, predicted.stderr
    expected = json.loads(predicted.stdout)
    measured = invoke("evaluate", home["head"], write_rows(tmp_path / "rows.jsonl", class_rows(8)), "--json", *DEVICE)
    assert json.loads(measured.stdout)["rows"] == 8, measured.stderr
    metrics = ServingMetrics()
    service = HeadService(ClassifyHead(Predictor.open(home["head"])), "classes", ServingLimits(), metrics)
    with served(service, ServingLimits(), metrics) as server:
        status, told, _ = ask(server, "/v1/classify", {"model": "classes", "input": "good the parcel came late"})
    assert status == 200, told
    assert told["data"][0]["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)


def test_a_reward_model_scores(home: Home, tmp_path: Path, invoke: Invoke) -> None:
    scored = invoke("score", home["reward"], write_rows(tmp_path / "pairs.jsonl", comparisons(6)), "--json", *DEVICE)
    assert scored.exit_code == 0, scored.stderr
    assert "pair_accuracy" in scored.stdout
    metrics = ServingMetrics()
    service = HeadService(ScoreHead(RewardPredictor.open(str(home["reward"]))), "judge", ServingLimits(), metrics)
    with served(service, ServingLimits(), metrics) as server:
        body = {"model": "judge", "prompt": "where is my parcel", "response": ["thank you", "just wait"]}
        status, told, _ = ask(server, "/v1/score", body)
    assert status == 200, told
    assert len({each["score"] for each in told["data"]}) == 2


@pytest.mark.parametrize("kind", slow_but("head", ["language", "head", "reward"]))
def test_the_folder_is_exported_as_it_is(kind: str, home: Home, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("export", home[kind], "--format", "huggingface", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    assert told["type"] == "torchao codes"
    assert told["largest_difference"] == 0
    weights = [load_file(folder / "model.safetensors") for folder in (home[kind], tmp_path / "out")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "weights in TORCHAO CODES" in card
    assert ("loopos generate" in card) == (kind == "language")
    words = {"language": ("generate", "-p", "the film", "--max-new-tokens", 2), "head": ("predict", "-")}.get(kind)
    if words is not None:
        again = invoke(words[0], tmp_path / "out", *words[1:], *DEVICE, text="good")
        assert again.exit_code == 0, again.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("--format", "gguf"),
            "--format gguf would round its weights a second time; use the model before quantization",
        ),
        (("--format", "modelfile"), "--format modelfile would round its weights a second time"),
        (("--format", "onnx"), "--format onnx would round its weights a second time"),
        (("--format", "adapter"), "--format adapter would round its weights a second time"),
        (("--format", "huggingface", "--type", "bf16"), "--type: got bf16 for"),
    ],
)
def test_exit_codes_are_never_written_as_numbers(
    words: tuple[str, ...], told: str, home: Home, language_run: Path, tmp_path: Path, invoke: Invoke
) -> None:
    result = invoke("export", home["language"], *words, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert told in result.stderr
    assert f"the model before quantization ({language_run})" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_codes_of_other_programs_are_refused(home: Home, tmp_path: Path, invoke: Invoke) -> None:
    foreign = shutil.copytree(home["language"], tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (foreign / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (foreign / "loopos-manifest.json").unlink()
    result = invoke("export", foreign, "--format", "huggingface", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "quantized with gptq, which LoopOS does not read" in result.stderr
