"""Pico models and data, made offline: a byte-level BPE tokenizer trained on a few sentences and tiny random transformers."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Set before torch is imported anywhere: tests run side by side, one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LOOPOS_NO_REEXEC"] = "1"
# Tests close terminals; under nohup the signal would be ignored, by their children too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

SENTENCES = [
    "the parcel came late and the box was open",
    "a kind answer within the hour, thank you",
    "my card was charged twice for one order",
    "the film was slow but the ending is lovely",
    "where is the invoice for march",
    "I love this little lamp, it lights the whole room",
    "never again: cold food and a rude waiter",
    "please change the address on my order",
    "it broke after two days and nobody replies",
    "good value, works as described",
]


def pytest_collection_finish() -> None:
    """What imports have made stays to the end: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pico_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE tokenizer of at most 400 tokens; pad, bos and eos are three different tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=512
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pico_folder(tmp_path_factory: pytest.TempPathFactory, pico_tokenizer: Path) -> Path:
    """Folder of a random two-layer Llama (d_model 32, 4 heads, 2 key-value heads, d_ff 64) with the pico tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("pico")
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pico_tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], Path]:
    """Writes rows as JSON Lines in the test's folder and returns the file."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return write


def toy_rows(number: int) -> list[dict[str, Any]]:
    """Sentences of very uneven length whose first word determines the class (0, 1, 2); the same for the same number."""
    openings = ("good", "bad", "where")
    return [
        {
            "text": f"{openings[i % 3]} {' '.join([SENTENCES[(i * 7) % 10]] * (1 + (i * i) % 5))}"[
                : 12 + (i * 37) % 160
            ],
            "label": i % 3,
        }
        for i in range(number)
    ]


@pytest.fixture
def fine_tuning_config(tmp_path: Path, pico_folder: Path, write_rows: Any) -> Callable[..., Any]:
    """Builds a `FineTuningConfig` on the pico model; sections are keyword dictionaries that override small defaults."""
    from loopos.config.fine_tuning import FineTuningConfig

    def build(*, model: Any = None, training: Any = None, data: Any = None, rows: int = 60) -> FineTuningConfig:
        file = tmp_path / "train.jsonl"
        if not file.exists():
            write_rows("train.jsonl", toy_rows(rows))
        sections = {
            "model": model or {},
            "computation": {"mode": "posttraining", "method": "fine_tuning"},
            "training": {
                "learning_rate": 0.01,
                "optimizer": "adamw",
                "batch_size": 8,
                "num_epochs": 1,
                "precision": "fp32",
                "schedule": "constant",
                "warmup": 0,
                **(training or {}),
            },
            "data": {
                "pretrained_weights": str(pico_folder),
                "training_data": str(file),
                "output_dir": str(tmp_path / "run"),
                **(data or {}),
            },
        }
        return FineTuningConfig.model_validate(sections)

    return build


@pytest.fixture
def few_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning and quantizing measure speed as ever, but fewer times: no test looks at how fast."""
    monkeypatch.setattr("loopos.compression.pipeline.NUM_RUNS", 1)
    monkeypatch.setattr("loopos.compression.pipeline.WRITTEN", 2)


FIGURES = {
    "report": ("curves_svg",),
    "task_report": ("confusion_svg", "residuals_svg"),
    "policy_report": ("curves_svg", "frontier_svg"),
}


@pytest.fixture(scope="session", autouse=True)
def _undrawn() -> Iterator[None]:
    """Reports have empty figures, but for tests that ask for `drawn`: drawing takes ten times a pico run's time."""
    with pytest.MonkeyPatch.context() as patch:
        for module, names in FIGURES.items():
            for name in names:
                patch.setattr(f"loopos.evaluation.{module}.{name}", _no_figure)
        yield


@pytest.fixture(scope="session", autouse=True)
def _not_flushed() -> Iterator[None]:
    """Files stay in the system's memory: tests end processes, never the machine, and a disk takes milliseconds a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _measured_once() -> Iterator[None]:
    """Dry runs measure this machine as ever, but once: each time takes a second."""
    from loopos.planning import dry_run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "measured_rates", cache(dry_run.measured_rates))
        yield


def _no_figure(*values: object, **named: object) -> str:
    return "<svg/>"


@contextmanager
def drawing() -> Iterator[None]:
    """Within it, reports have their figures."""
    from loopos.evaluation import drawing
    from loopos.evaluation import policy_report as frontier

    with pytest.MonkeyPatch.context() as patch:
        for module, names in FIGURES.items():
            for name in names:
                source = frontier if name == "frontier_svg" else drawing
                patch.setattr(f"loopos.evaluation.{module}.{name}", getattr(source, name))
        yield


@pytest.fixture(scope="module")
def drawn() -> Iterator[None]:
    """Reports have their figures, from here to the end of the file."""
    with drawing():
        yield


@pytest.fixture(autouse=True)
def _single_threaded() -> None:
    """Exact comparisons between runs need the same number of threads in both."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Forty paragraphs of a few sentences each."""
    draw = random.Random(0)
    file = tmp_path / "text.md"
    file.write_text("\n\n".join(" ".join(draw.choices(SENTENCES, k=4)) for _ in range(40)), encoding="utf-8")
    return file
