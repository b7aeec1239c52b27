"""A model with a head gives LoopOS's own outputs in plain transformers, or does not open there."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from pico_runs import class_rows, config_of, pair_tokenizer, save_pico, slow_but, train
from plain_transformers import LABELS, TEXTS, by_loopos, by_pipeline, cell, largest, trained
from preference_runs import reward_config
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaModel,
)

from loopos.data.conversations import Message
from loopos.evaluation.predictor import Predictor
from loopos.evaluation.reward_predictor import RewardPredictor
from loopos.exporting.checks import ExportDiffers
from loopos.exporting.export import export
from loopos.exporting.settings import ExportSettings
from loopos.methods.reward_model import RewardModelTrainer
from loopos.models import task_layout
from loopos.training.progress import RunProgress

HUGGING_FACE = ExportSettings(format="huggingface")


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the code of a trusted folder to a cache; not the user's."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hand_over")


@pytest.fixture(scope="module")
def bert_folder(home: Path) -> Path:
    return save_pico("bert", home / "bert", pair_tokenizer(home / "wordpiece"))


@pytest.mark.parametrize(
    ("task", "lora", "model"),
    slow_but(
        ("multi_label", True, {}),
        [("classification", False, {}), ("multi_label", True, {}), ("regression", False, {"target_scaling": "scale"})],
    ),
)
def test_a_default_head_opens_right_in_plain_transformers(
    task: str, lora: bool, model: dict[str, str], home: Path, pico_folder: Path
) -> None:
    run = trained(home / f"default_{task}", pico_folder, task, lora=lora, **model)
    expected = by_loopos(run)
    assert largest(expected, [expected[0]] * len(expected)) > 1e-3, "the texts are told apart"
    for side, batch_size in (("right", 4), ("left", 3)):
        assert largest(expected, by_pipeline(run / "model", side=side, batch_size=batch_size)) < 1e-5
    export(str(run), home / f"out_{task}", HUGGING_FACE)
    assert largest(expected, by_pipeline(home / f"out_{task}")) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "task", "model"),
    slow_but(
        [("llama", "classification", {"pooling": "mean"}), ("bert", "regression", {})],
        [
            ("llama", "classification", {"pooling": "mean"}),
            ("llama", "multi_label", {"pooling": "max"}),
            ("llama", "regression", {"target_scaling": "standardize"}),
            ("bert", "regression", {}),
            ("bert", "classification", {"pooling": "first"}),
        ],
    ),
)
def test_every_other_head_is_refused_in_plain_transformers_and_right_when_trusted(
    architecture: str, task: str, model: dict[str, str], home: Path, pico_folder: Path, bert_folder: Path
) -> None:
    name = f"{architecture}_{task}_{'_'.join(model.values())}"
    run = trained(home / name, {"llama": pico_folder, "bert": bert_folder}[architecture], task, **model)
    folder, expected = run / "model", by_loopos(run)
    for opener in (AutoConfig, AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            opener.from_pretrained(folder, trust_remote_code=False)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        by_pipeline(folder)
    outright = {"llama": LlamaForSequenceClassification, "bert": BertForSequenceClassification}[architecture]
    with pytest.raises((RuntimeError, AssertionError, IndexError)):
        outright.from_pretrained(folder)
    for side, batch_size in (("right", 1), ("left", 4)):
        assert largest(expected, by_pipeline(folder, trust=True, side=side, batch_size=batch_size)) < 1e-5
    done = export(str(run), home / f"{name}_out", HUGGING_FACE)
    assert "without trust_remote_code transformers refuses the folder" in done.notes[-1]
    assert largest(expected, by_pipeline(home / f"{name}_out", trust=True, side="left")) < 1e-5
    card = (home / f"{name}_out" / "README.md").read_text()
    assert "trust_remote_code=True)" in card


def test_a_text_that_ends_with_the_padding_token(home: Path, tmp_path: Path, pico_folder: Path) -> None:
    """transformers' classifiers skip pads by their id: a pad that also ends texts would be skipped with them."""
    weights = tmp_path / "weights"
    shutil.copytree(pico_folder, weights)
    tokenizer = AutoTokenizer.from_pretrained(weights)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(weights)
    run = trained(tmp_path / "run", weights, "classification")
    texts = ["good lamp<eos>", "bad the parcel came late<eos>", "film"]
    assert largest(by_loopos(run, texts), by_pipeline(run / "model", texts)) < 1e-5


def older_layout(run: Path, pico_folder: Path, to: Path) -> Path:
    """The folder as LoopOS wrote it before: only the backbone, which any class of transformers opens."""
    shutil.copytree(run / "model", to)
    backbone, _ = LlamaModel.from_pretrained(
        run / "model", config=AutoConfig.from_pretrained(pico_folder), output_loading_info=True
    )
    backbone.save_pretrained(to)
    for name in ("modeling_loopos.py", "loopos-manifest.json"):
        (to / name).unlink()
    return to


@pytest.mark.slow
def test_a_folder_of_an_older_version_opens_and_is_exported_right(
    home: Path, tmp_path: Path, pico_folder: Path
) -> None:
    run = trained(tmp_path / "run", pico_folder, "regression", pooling="mean")
    old = older_layout(run, pico_folder, tmp_path / "old")
    assert "score.weight" not in load_file(old / "model.safetensors")
    assert json.loads((old / "config.json").read_text())["model_type"] == "llama"
    expected = by_loopos(run)
    assert largest(expected, by_loopos(old)) < 1e-6
    export(str(old), tmp_path / "out", HUGGING_FACE)
    assert largest(expected, by_loopos(tmp_path / "out")) < 1e-6
    assert cell(tmp_path / "out").startswith("refuses; trusted ")
    assert largest(expected, by_pipeline(tmp_path / "out", trust=True)) < 1e-4


@pytest.mark.slow
def test_an_export_that_answers_otherwise_is_a_diagnostic(
    tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old bug: a head in standardized units that transformers reads as the user's."""
    run = trained(tmp_path / "run", pico_folder, "regression", target_scaling="scale")
    honest = task_layout.outputs_of_head
    monkeypatch.setattr(
        task_layout, "outputs_of_head", lambda head, told: honest(head, {**told, "target_mean": 0.0, "target_std": 1.0})
    )
    with pytest.raises(ExportDiffers, match="the export differs from the original model"):
        export(str(run), tmp_path / "out", HUGGING_FACE)
    assert not (tmp_path / "out").exists()
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_a_run_that_resumes_keeps_the_pooling_and_the_scaling_that_it_began_with(
    tmp_path: Path, pico_folder: Path
) -> None:
    """A run of an older version, whose config has pooling mean and no target scaling."""
    rows = class_rows(24, LABELS["regression"])
    config = config_of(tmp_path / "run", pico_folder, rows, model={"pooling": "mean"}, training={"num_epochs": 1})
    train(config)
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    del recorded["model"]["target_scaling"], recorded["model"]["head_init_std"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(recorded))
    silent = config_of(tmp_path / "run", pico_folder, rows, training={"num_epochs": 2})
    assert silent.model.pooling == "auto"
    train(silent, resume=True)
    description = Predictor.open(tmp_path / "run").description
    assert description["pooling"] == "mean"
    assert description["target_mean"] == pytest.approx(sum(LABELS["regression"]) / 3, rel=0.02)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["pooling"] == "mean"


@pytest.mark.parametrize(
    ("reward", "trust"), slow_but(({"heads": 3}, True), [({"normalize": False}, False), ({"heads": 3}, True)])
)
def test_a_reward_model_gives_its_scores(
    reward: dict[str, int], trust: bool, tmp_path: Path, pico_folder: Path
) -> None:
    config = reward_config(tmp_path / "run", pico_folder, reward=reward, training={"num_epochs": 1})
    RewardModelTrainer(config, progress=RunProgress(quiet=True)).train()
    ours = RewardPredictor.open(str(tmp_path / "run"))
    conversations = [
        ([Message("user", "where is my order")], [Message("assistant", answer)])
        for answer in ("it came late", "a kind answer within the hour")
    ]
    expected = [[judged.score] for judged in ours.judge(conversations)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model", trust_remote_code=trust)
    folder = tmp_path / "run" / "model"
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=trust).eval()
    texts = [
        tokenizer.apply_chat_template([each.as_template() for each in (*prompt, *answer)], tokenize=False).rstrip()
        for prompt, answer in conversations
    ]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert largest(expected, theirs(**batch).logits.tolist()) < 1e-4
    done = export(str(tmp_path / "run"), tmp_path / "out", HUGGING_FACE)
    assert done.check is not None
    assert done.check.largest < 1e-4


@pytest.mark.slow
def test_an_onnx_graph_gives_values_in_the_files_unit_wherever_pads_are(tmp_path: Path, pico_folder: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    from loopos.exporting.onnx import onnx_logits

    run = trained(tmp_path / "run", pico_folder, "regression", pooling="mean")
    export(str(run), tmp_path / "out", ExportSettings(format="onnx"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(TEXTS, padding=True, padding_side="left", return_tensors="pt")
    assert largest(by_loopos(run), onnx_logits(tmp_path / "out" / "model.onnx", dict(batch)).tolist()) < 1e-4


@pytest.mark.slow
def test_the_whole_table(tmp_path: Path, pico_folder: Path, bert_folder: Path) -> None:
    """Every pooling, task, way of training and folder; with -s it is printed."""
    lines = []
    for architecture, weights in (("llama", pico_folder), ("bert", bert_folder)):
        for pooling, task, lora in product(("mean", "last", "first", "max"), LABELS, (False, True)):
            run = trained(
                tmp_path / f"{architecture}_{pooling}_{task}_{lora}", weights, task, lora=lora, pooling=pooling
            )
            done = export(str(run), run / "out", HUGGING_FACE)
            # The graph of an encoder takes the same way, and the tracing most of the time.
            graph = not lora and architecture == "llama"
            onnx = export(str(run), run / "onnx", ExportSettings(format="onnx")) if graph else None
            cells = [cell(run / "model"), cell(run / "out")]
            told = f"{onnx.check.largest:.0e}" if onnx is not None and onnx.check is not None else ""
            way = "LoRA" if lora else "full"
            lines.append(f"| {architecture} | {pooling} | {task} | {way} | {' | '.join(cells)} | {told} |")
            print(lines[-1], flush=True)
            assert all(float(each.rpartition(" ")[2]) < 1e-4 for each in cells)
            assert done.check is not None
            assert done.check.largest < 1e-4
    assert len(lines) == 48
