"""Pretraining through its entry point: it learns, resumes exactly, and its weights are what fine-tuning names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.pretraining import PretrainingConfig
from loopos.data.corpus import read_corpus
from loopos.data.tokens import encode_corpus, train_tokenizer
from loopos.functional.packing import PackedLayout
from loopos.methods.fine_tuning import FineTuner
from loopos.methods.pretraining import Pretrainer
from loopos.models.language_model import LanguageModel
from loopos.storage.events import read
from loopos.training.progress import RunProgress

SENTENCES = (
    "the parcel came late and the box was open",
    "a kind answer within the hour, thank you",
    "my card was charged twice for one order",
    "where is the invoice for march",
    "good value, works as described",
)
SIZES = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 64, "vocab_size": 300}


def config_in(folder: Path, **training: Any) -> PretrainingConfig:
    text = folder / "text.txt"
    text.write_text("\n\n".join(SENTENCES * 8), encoding="utf-8")
    return PretrainingConfig.model_validate(
        {
            "model": SIZES,
            "computation": {"mode": "pretraining", "method": "autoregressive"},
            "training": {"learning_rate": 0.01, "max_length": 24, "batch_size": 8, "precision": "fp32", **training},
            "data": {
                "input_file": str(text),
                # The text repeats its sentences, and what is learned of them shows in validation.
                "split_by": "row",
                "output_dir": str(folder / "run"),
                "output_weights": str(folder / "models" / "pretrained_model.bin"),
            },
        }
    )


def train(config: Any, *, resume: bool = False) -> Any:
    return Pretrainer(config, progress=RunProgress(quiet=True)).train(resume=resume)


def test_it_learns_and_fine_tuning_starts_from_its_weights(tmp_path: Path) -> None:
    train(config_in(tmp_path, num_epochs=6))
    validations = [
        event["metrics"] for event in read(tmp_path / "run" / "events.jsonl") if event["event"] == "validation"
    ]
    assert validations[0]["loss"] == pytest.approx(math.log(300), rel=0.05)
    assert validations[-1]["loss"] < 0.5 * validations[0]["loss"]
    assert validations[-1]["perplexity"] == pytest.approx(math.exp(validations[-1]["loss"]))

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{SENTENCES[i % 3]} {i}", "label": {i % 3}}}\n' for i in range(30)))
    tuned = FineTuningConfig.model_validate(
        {
            "model": {**SIZES, "num_classes": 3},
            "computation": {"mode": "posttraining", "method": "fine_tuning"},
            "training": {"learning_rate": 1e-5, "num_epochs": 1, "precision": "fp32"},
            "data": {
                "pretrained_weights": str(tmp_path / "models" / "pretrained_model.bin"),
                "training_data": str(rows),
                "output_dir": str(tmp_path / "tuned"),
            },
        }
    )
    assert FineTuner(tuned, progress=RunProgress(quiet=True)).train().stopped_by == "epochs"


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    # A decaying rate would depend on max_steps.
    training = {"num_epochs": 2, "save_every": 2, "schedule": "constant", "warmup": 0}
    train(config_in(whole, **training))
    train(config_in(cut, **training, max_steps=4))
    train(config_in(cut, **training), resume=True)
    weights = [(folder / "models" / "pretrained_model.bin").read_bytes() for folder in (whole, cut)]
    assert weights[0] == weights[1]
    last = [max((folder / "run" / "checkpoints").glob("step-*")) for folder in (whole, cut)]
    assert (last[0] / "optimizer.safetensors").read_bytes() == (last[1] / "optimizer.safetensors").read_bytes()


def test_without_text_to_validate_on_it_trains_all_the_same(tmp_path: Path) -> None:
    config = config_in(tmp_path, num_epochs=1)
    train(config.model_copy(update={"data": config.data.model_copy(update={"validation_share": 0.0})}))
    kinds = [event["event"] for event in read(tmp_path / "run" / "events.jsonl")]
    assert "step" in kinds
    assert "validation" not in kinds
    assert (tmp_path / "models" / "pretrained_model.bin").is_file()


def test_the_loss_is_that_of_transformers(pico_folder: Path) -> None:
    causal = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32).eval()
    lengths = (7, 3, 12)
    ids = torch.randint(3, 400, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = [causal(input_ids=part[None], labels=part[None]).loss * (len(part) - 1) for part in ids.split(lengths)]
        found = LanguageModel(causal)(ids, PackedLayout(lengths))
    assert found.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-5)


def test_chunks_by_hand() -> None:
    tokenizer = train_tokenizer(["ab"], 300)
    letters = tokenizer("abcdefg", add_special_tokens=False)["input_ids"]
    whole = [*letters, tokenizer.eos_token_id]
    pieces = [piece.ids for piece in encode_corpus(tokenizer, ["abcdefg"], max_length=4)]
    # Each piece begins with the last token of the one before: every token but the first is predicted once.
    assert pieces[0] == whole[:4]
    assert [piece[0] for piece in pieces[1:]] == [piece[-1] for piece in pieces[:-1]]
    assert [*pieces[0], *(token for piece in pieces[1:] for token in piece[1:])] == whole
    assert len(pieces) >= 2


def test_documents_are_parted_by_blank_lines(tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("one\ntwo\n\n  \nthree\r\n\r\nfour\n", encoding="utf-8")
    assert read_corpus(str(text), {}).documents == ("one\ntwo", "three", "four")


def test_every_text_is_written_and_read_back() -> None:
    tokenizer = train_tokenizer(SENTENCES, 300)
    for text in ("Grüße, 世界! \t 🙂", "the parcel", "  spaces  kept "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
