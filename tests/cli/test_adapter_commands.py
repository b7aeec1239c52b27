"""A PEFT adapter's folder is a model to every command: text, training, export and merging by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import Invoke, write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """PiSSA over the pico model, changed as by training."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("foreign") / "adapter"
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pico_folder), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def under_peft(adapter: Path, pico_folder: Path) -> str:
    """Twelve greedy tokens behind a prompt, by peft."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico_folder), str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    ids = tokenizer("the parcel", return_tensors="pt")["input_ids"]
    written = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def text_of(path: Path, invoke: Invoke) -> str:
    options = ("--raw", "--temperature", "0", "--max-new-tokens", "12", "--json")
    result = invoke("generate", path, "--prompt", "the parcel", *options)
    assert result.exit_code == 0, result.stderr
    return str(json.loads(result.stdout)["text"])


def test_text_is_pefts_by_the_adapter_its_export_and_its_merge(
    adapter: Path, under_peft: str, tmp_path: Path, invoke: Invoke
) -> None:
    assert text_of(adapter, invoke) == under_peft
    result = invoke("export", adapter, "--format", "huggingface", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["greedy_texts"] == ["greedy text by transformers: 16 of 16 tokens the same"]
    assert told["warning"] is None
    assert text_of(tmp_path / "out", invoke) == under_peft
    result = invoke("merge", adapter, adapter, "--method", "linear", "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    assert text_of(tmp_path / "merged", invoke) == under_peft


def test_training_begins_at_an_adapter(adapter: Path, under_peft: str, tmp_path: Path, invoke: Invoke) -> None:
    """At a rate of almost 0 what comes out is what went in."""
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "the", "completion": " box"}] * 4)
    config = {
        "computation": {"mode": "posttraining", "method": "chain_of_thought"},
        "training": {
            "learning_rate": 1e-12, "num_epochs": 1, "batch_size": 4, "precision": "fp32", "trainable": "lora",
        },
        "data": {
            "pretrained_weights": str(adapter), "training_data": str(data), "validation_share": 0.0,
            "output_dir": str(tmp_path / "run"),
        },
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(config))
    result = invoke("train", tmp_path / "c.json", "--dry-run")
    assert result.exit_code == 0, result.stderr
    result = invoke("train", tmp_path / "c.json", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert text_of(tmp_path / "run", invoke) == under_peft
    # The run's own adapter lies over the foreign one.
    assert text_of(tmp_path / "run" / "adapter", invoke) == under_peft


def test_a_broken_adapter_is_one_line_of_every_command(adapter: Path, tmp_path: Path, invoke: Invoke) -> None:
    place = tmp_path / "broken"
    shutil.copytree(adapter, place)
    file = place / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": None}))
    out = tmp_path / "out"
    for words in (
        ("generate", place, "--prompt", "the"),
        ("export", place, "--format", "huggingface", "-o", out),
        ("merge", place, place, "--method", "linear", "-o", out),
        ("quantize", place, "--method", "int8", "-o", out),
    ):
        result = invoke(*words)
        assert result.exit_code == 2, (words, result.stderr, result.exception)
        [line] = result.stderr.strip().splitlines()
        assert line.endswith("adapter_config.json: lora_alpha: expected a number, got null"), line
    assert not out.exists()


def test_a_lossy_export_with_other_outputs_has_its_own_exit_code(
    pico_folder: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr("loopos.exporting.checks.LEAST_SAME", {"q8_0": 1.1})
    result = invoke("export", pico_folder, "--format", "gguf", "--type", "q8_0", "-o", tmp_path / "out")
    assert result.exit_code == 6, result.stderr
    assert "warning: q8_0 changes the model's predictions: the top prediction is the same at" in result.stderr
    assert (tmp_path / "out" / "out-Q8_0.gguf").is_file()
    assert "changes the model's predictions" in (tmp_path / "out" / "report.md").read_text()
