"""Every pooling trains, and the model folder opens where LoopOS is not installed (`test_plain_transformers.py` has the rest)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pico_runs import WORDS, class_rows, config_of, events_of, pair_tokenizer, save_pico, slow_but, text_of, train
from transformers import AutoModelForSequenceClassification

from loopos.functional.packing import PackedLayout
from loopos.models.folders import open_task_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fine_tuning")


def losses_of(run: Path) -> list[float]:
    return [event["metrics"]["loss"] for event in events_of(run, "step")]


@pytest.fixture(scope="module")
def bert_folder(home: Path) -> Path:
    return save_pico("bert", home / "bert", pair_tokenizer(home / "wordpiece"))


@pytest.mark.parametrize("architecture", slow_but("gpt2", ["llama", "gpt2", "qwen3"]))
def test_pooling_last_opens_as_transformers_own_classifier(architecture: str, home: Path, pico_tokenizer: Path) -> None:
    weights = save_pico(architecture, home / architecture, pico_tokenizer)
    run = home / f"last_{architecture}"
    train(config_of(run, weights, class_rows(24), model={"pooling": "last"}, training={"num_epochs": 1}))
    model, tokenizer, _ = open_task_model(run)
    theirs = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    texts = [text_of(word, i) for i, word in enumerate(WORDS[:4])]
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            mine = model.eval()(ids[0], PackedLayout((ids.shape[1],)))
            torch.testing.assert_close(mine, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert theirs.config.id2label == {0: "0", 1: "1", 2: "2"}


@pytest.mark.parametrize("pooling", slow_but(["first", "max"], ["mean", "last", "first", "max"]))
def test_every_pooling_trains(pooling: str, home: Path, bert_folder: Path) -> None:
    # An encoder: in a causal model the first token sees itself alone.
    run = home / f"pooling_{pooling}"
    train(config_of(run, bert_folder, class_rows(48), model={"pooling": pooling}, training={"num_epochs": 4}))
    assert losses_of(run)[-1] < losses_of(run)[0] / 2


@pytest.mark.slow
def test_the_model_folder_opens_where_loopos_is_not_imported(home: Path, pico_folder: Path) -> None:
    run = home / "alone"
    train(config_of(run, pico_folder, class_rows(16), training={"max_steps": 1}))
    code = (
        "import sys; from transformers import AutoModel, AutoTokenizer\n"
        "model = AutoModel.from_pretrained(sys.argv[1]); AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert 'loopos' not in sys.modules; print(model.config._attn_implementation)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run / "model")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split()[-1] == "sdpa"
