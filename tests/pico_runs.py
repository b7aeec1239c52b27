"""Shared by the tests of trained runs: pico models of several architectures, separable toy rows, one-call runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loopos.config.fine_tuning import FineTuningConfig
from loopos.methods.fine_tuning import FineTuner
from loopos.storage.events import read
from loopos.training.fit import FitResult
from loopos.training.progress import RunProgress

WORDS = ("good", "bad", "where", "film", "order", "lamp", "late", "kind")
FILLERS = (
    "the parcel came late",
    "please change it",
    "my card was charged",
    "it broke after two days",
    "a lovely ending",
)
SIZES: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}


def save_pico(architecture: str, folder: Path, tokenizer: Path) -> Path:
    """A random model with its language-model head and the tokenizer, as a folder."""
    torch.manual_seed(0)
    if architecture == "llama":
        config = LlamaConfig(
            **SIZES, **SPECIAL, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=256
        )
        model = LlamaForCausalLM(config)
    elif architecture == "qwen3":
        config = Qwen3Config(**SIZES, **SPECIAL, intermediate_size=64, num_key_value_heads=2, head_dim=8)
        model = Qwen3ForCausalLM(config)
    elif architecture == "gpt2":
        zero = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=256, **SPECIAL, **zero)
        )
    else:
        assert architecture == "bert"
        zero = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertModel(
            BertConfig(**SIZES, intermediate_size=64, max_position_embeddings=64, initializer_range=0.1, **zero)
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def pair_tokenizer(folder: Path) -> Path:
    """A WordPiece tokenizer that frames texts as [CLS] a [SEP] b [SEP] and gives segment ids, as BERT's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        [*FILLERS, " ".join(WORDS)],
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=names, show_progress=False),
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=64,
    ).save_pretrained(folder)
    return folder


def text_of(word: str, number: int) -> str:
    """A text that `word` opens, of uneven length."""
    return " ".join([word, *(FILLERS[(number + k) % len(FILLERS)] for k in range(number * number % 4))])


def class_rows(number: int, labels: Iterable[object] = (0, 1, 2)) -> list[dict[str, Any]]:
    """The opening word determines the class."""
    names = list(labels)
    return [
        {"text": text_of(WORDS[i % len(names)], i // len(names)), "label": names[i % len(names)]} for i in range(number)
    ]


def write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def config_of(
    run: Path,
    weights: Path | str,
    rows: list[dict[str, Any]],
    *,
    model: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> FineTuningConfig:
    """A fine-tuning config over small defaults; the rows are written beside the run."""
    file = write_jsonl(run.parent / f"{run.name}.jsonl", rows)
    small = {
        "learning_rate": 0.01,
        "optimizer": "adamw",
        "batch_size": 8,
        "num_epochs": 2,
        "precision": "fp32",
        "seed": 5,
        "schedule": "constant",
        "warmup": 0,
    }
    return FineTuningConfig.model_validate(
        {
            "model": dict(model or {}),
            "computation": {"mode": "posttraining", "method": "fine_tuning"},
            "training": {**small, **(training or {})},
            "data": {
                "pretrained_weights": str(weights),
                "training_data": str(file),
                "output_dir": str(run),
                # Small tables repeat their texts, and what is learned of them shows in validation.
                "split_by": "row",
                **(data or {}),
            },
        }
    )


def train(config: FineTuningConfig, *, resume: bool = False, report: bool = False) -> FitResult:
    """The whole of a run. Its report is left out unless asked for: drawing takes ten times a pico run's time."""
    with nullcontext() if report else patch("loopos.methods.base.write_report"):
        return FineTuner(config, progress=RunProgress(quiet=True)).train(resume=resume)


def prepared(config: FineTuningConfig) -> FineTuner:
    """A tuner with data and model built, as `train` does before its first step."""
    tuner = FineTuner(config, progress=RunProgress(quiet=True))
    tuner.device = torch.device("cpu")
    tuner.load_data()
    tuner.build_model()
    return tuner


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read(run / "events.jsonl") if event["event"] == kind]


def last_weights(run: Path) -> dict[str, Tensor]:
    return load_file(max((run / "checkpoints").glob("step-*")) / "weights.safetensors")


def hidden_states(model: nn.Module) -> Tensor:
    """Last hidden states `[1, 17, d]` of a fixed text."""
    with torch.no_grad():
        hidden: Tensor = model.eval()(input_ids=torch.arange(3, 20)[None]).last_hidden_state
    return hidden


def write_weight_files(home: Path, folder: Path) -> Path:
    """The model in `folder` as single files: beside its config.json (with/), and beside only a tokenizer (bare/)."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("with", "bare"):
        AutoTokenizer.from_pretrained(folder).save_pretrained(home / name)
        save_file(tensors, home / name / "weights.safetensors", metadata={"format": "pt"})
        torch.save(tensors, home / name / "weights.bin")
    shutil.copy(folder / "config.json", home / "with" / "config.json")
    return home


def slow_but(quick: Any, cases: Iterable[Any]) -> list[Any]:
    """The cases of a parametrized test, of which all but `quick` are slow: one case, or a list of them. A tuple is a
    case of several arguments.
    """
    chosen = quick if isinstance(quick, list) else [quick]
    cases = list(cases)
    assert all(case in cases for case in chosen), f"no such cases: {chosen}"
    return [case if case in chosen else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
