"""Fine-tuning through its real entry point: the guide's own config, every task, what the labels show to be wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import WORDS, class_rows, config_of, events_of, pair_tokenizer, save_pico, text_of, train
from transformers import AutoTokenizer

from loopos.config.diagnostics import ConfigError, UserError
from loopos.data.tokens import encode_labeled
from loopos.evaluation.predictor import Predictor
from loopos.functional.packing import PackedLayout
from loopos.training.fit import FitResult
from tests.conftest import drawing


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fine_tuning")


def losses_of(run: Path) -> list[float]:
    return [event["metrics"]["loss"] for event in events_of(run, "step")]


def best_of(run: Path, metric: str) -> float:
    values = [event["metrics"][metric] for event in events_of(run, "validation") if event["metrics"]["best"]]
    return float(values[-1])


# The guide's own config -----------------------------------------------------------------------------------------------

GUIDE: dict[str, Any] = {
    "model": {"type": "transformer", "d_model": 384, "num_heads": 8, "num_layers": 4, "d_ff": 1536, "vocab_size": 16000,
              "num_classes": 10},
    "computation": {"mode": "posttraining", "method": "fine_tuning"},
    "training": {"learning_rate": 0.00001, "batch_size": 16, "num_epochs": 5},
}  # fmt: skip


SMALLER = {"d_model": 48, "num_layers": 2, "d_ff": 96, "vocab_size": 400}


@pytest.fixture(
    scope="module",
    params=[pytest.param(SMALLER, id="smaller"), pytest.param({}, id="as it is", marks=pytest.mark.slow)],
)
def guide(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The guide's config without its paths, and with smaller sizes."""
    return {**GUIDE, "model": {**GUIDE["model"], **request.param}}


@pytest.fixture(scope="module")
def guide_home(guide: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guide")


@pytest.fixture(scope="module")
def guide_weights(guide: dict[str, Any], guide_home: Path) -> Path:
    """A model of the config's sizes as `models/pretrained_model.bin` beside a tokenizer of as many tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes, folder = guide["model"], guide_home / "models"
    vocabulary = {"<unk>": 0, **{f"word{i}": i for i in range(1, sizes["vocab_size"])}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["d_model"], intermediate_size=sizes["d_ff"],
        num_hidden_layers=sizes["num_layers"], num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_heads"], tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.save(model.state_dict(), folder / "pretrained_model.bin")
    assert not (folder / "config.json").exists()
    as_folder = guide_home / "as_folder"
    model.save_pretrained(as_folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(as_folder)
    return folder / "pretrained_model.bin"


@pytest.fixture(scope="module")
def guide_runs(guide: dict[str, Any], guide_weights: Path, guide_home: Path) -> dict[str, FitResult]:
    """The guide's config, run as it is read from its file."""
    from loopos.config.load import load
    from loopos.config.methods import config_classes

    data = guide_home / "classification_train.txt"
    data.write_text(
        "".join(json.dumps({"text": f"word{1 + i % 10} word{20 + i}", "label": i % 10}) + "\n" for i in range(40))
    )
    results = {}
    for name, weights in (("bin", guide_weights), ("folder", guide_home / "as_folder")):
        run, file = guide_home / f"guide_{name}", guide_home / f"guide_{name}.json"
        paths = {"pretrained_weights": str(weights), "training_data": str(data), "output_dir": str(run)}
        file.write_text(json.dumps({**guide, "data": paths}))
        with drawing():
            results[name] = train(load(file, (), config_classes()).config, report=name == "bin")
    return results


def test_the_guides_config_trains_validates_saves_and_predicts(
    guide_runs: dict[str, FitResult], guide_home: Path
) -> None:
    run = guide_home / "guide_bin"
    # 36 of 40 rows train, 16 a step: 3 steps an epoch, 5 epochs.
    assert (guide_runs["bin"].step, guide_runs["bin"].stopped_by) == (15, "epochs")
    assert len(events_of(run, "validation")) == 6
    steps = [event["metrics"] for event in events_of(run, "step")]
    # Warmup over the first of 15 steps, then half a cosine to 0 after the last.
    expected = [1e-5, *(1e-5 * (1 + math.cos(math.pi * done / 14)) / 2 for done in range(14))]
    assert [step["learning_rate"] for step in steps] == pytest.approx(expected)
    assert all(math.isfinite(step["loss"]) for step in steps)
    predictions = Predictor.open(run).predict(["word3 word7", "word1"])
    assert [set(p) for p in predictions] == [{"label", "probabilities"}] * 2
    assert all(len(p["probabilities"]) == 10 for p in predictions)
    assert all(sum(p["probabilities"].values()) == pytest.approx(1.0) for p in predictions)
    assert "![loss](curves/loss.svg)" in (run / "report.md").read_text()
    assert (run / "curves" / "loss.svg").stat().st_size > 1000


def test_a_bare_file_and_a_folder_are_the_same_model(guide_runs: dict[str, FitResult], guide_home: Path) -> None:
    assert guide_runs["folder"].step == guide_runs["bin"].step
    one, other = losses_of(guide_home / "guide_bin"), losses_of(guide_home / "guide_folder")
    assert len(one) == guide_runs["bin"].step
    assert one == other


# Tasks ----------------------------------------------------------------------------------------------------------------


CLASSES: dict[str, tuple[object, ...]] = {"numbers": (0, 1, 2), "names": ("praise", "anger", "question")}


@pytest.fixture(scope="module")
def class_runs(home: Path, pico_folder: Path) -> dict[str, Path]:
    """Runs on whole-number and on text labels."""
    for name, labels in CLASSES.items():
        train(config_of(home / name, pico_folder, class_rows(90, labels), training={"num_epochs": 3}))
    return {name: home / name for name in CLASSES}


def test_classes_of_whole_numbers_and_of_text(class_runs: dict[str, Path]) -> None:
    for name, labels in CLASSES.items():
        run = class_runs[name]
        losses = losses_of(run)
        assert losses[-1] < losses[0] / 4
        assert best_of(run, "accuracy") > 0.9
        predicted = Predictor.open(run).predict([text_of(word, 2) for word in WORDS[:3]])
        assert [p["label"] for p in predicted] == list(labels)
        assert all(type(p["label"]) is type(label) for p, label in zip(predicted, labels, strict=True))
        config = json.loads((run / "model" / "config.json").read_text())
        # Classes of text are sorted.
        expected = sorted(map(str, labels))
        assert config["id2label"] == {str(i): label for i, label in enumerate(expected)}
        assert config["label2id"] == {label: i for i, label in enumerate(expected)}
        assert config["problem_type"] == "single_label_classification"


def test_labels_that_may_come_together(home: Path, pico_folder: Path) -> None:
    rows = []
    for i in range(120):
        chosen = [name for bit, name in enumerate(("cold", "rude", "slow")) if (i % 8) >> bit & 1]
        words = [word for bit, word in enumerate(WORDS[:3]) if (i % 8) >> bit & 1] or ["kind"]
        rows.append({"text": " ".join(words), "label": chosen})
    run = home / "multi_label"
    train(config_of(run, pico_folder, rows, training={"num_epochs": 4}))
    assert losses_of(run)[-1] < losses_of(run)[0] / 3
    assert best_of(run, "micro_f1") > 0.9
    predicted = Predictor.open(run).predict(["good where", "kind", "bad"])
    assert [p["labels"] for p in predicted] == [["cold", "slow"], [], ["rude"]]
    # Every class has a probability of its own: they need not sum to 1.
    assert set(predicted[0]["probabilities"]) == {"cold", "rude", "slow"}
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"


def regression_rows(scale: float, shift: float) -> list[dict[str, Any]]:
    values = {"good": 4.5, "bad": -2.25, "where": 1.0}
    return [{"text": text_of(word, i), "label": scale * values[word] + shift} for i in range(30) for word in values]


def test_values_come_back_in_the_users_unit(home: Path, pico_folder: Path) -> None:
    texts = [text_of(word, 1) for word in ("good", "bad", "where")]
    predictions = {}
    for name, scale, shift in (("plain", 1.0, 0.0), ("scaled", 100.0, 1000.0)):
        run = home / f"regression_{name}"
        # Said, since 1450.0 and 775.0 are whole numbers and would be read as classes.
        config = config_of(
            run,
            pico_folder,
            regression_rows(scale, shift),
            model={"task": "regression", "target_scaling": "standardize"},
            training={"num_epochs": 4},
        )
        train(config)
        assert losses_of(run)[-1] < losses_of(run)[0] / 4
        assert best_of(run, "mae") < 0.4 * scale
        predictions[name] = [p["value"] for p in Predictor.open(run).predict(texts)]
    assert predictions["plain"] == pytest.approx([4.5, -2.25, 1.0], abs=0.5)
    assert predictions["scaled"] == pytest.approx([100 * value + 1000 for value in predictions["plain"]], abs=0.05)
    # Standardised inside, the two runs have the same losses; the unit shows in the metrics alone.
    assert losses_of(home / "regression_scaled") == pytest.approx(losses_of(home / "regression_plain"), rel=1e-4)
    described = json.loads((home / "regression_scaled" / "model" / "loopos.json").read_text())
    plain = json.loads((home / "regression_plain" / "model" / "loopos.json").read_text())
    assert described["target_mean"] == pytest.approx(100 * plain["target_mean"] + 1000)
    assert described["target_std"] == pytest.approx(100 * plain["target_std"])


@pytest.fixture(scope="module")
def bert_folder(home: Path) -> Path:
    return save_pico("bert", home / "bert", pair_tokenizer(home / "wordpiece"))


def pair_rows() -> list[dict[str, Any]]:
    """The label is whether the second text begins with the first's word."""
    return [
        {
            "text": text_of(WORDS[i % 4], i),
            "text_pair": text_of(WORDS[(i % 4 + (i // 4) % 2) % 4], i // 2),
            "label": (i // 4) % 2,
        }
        for i in range(64)
    ]


def test_pairs_of_texts_learn_and_packed_segments_equal_padded_ones(home: Path, bert_folder: Path) -> None:
    run = home / "pairs"
    rows = [{**row, "label": ["same", "other"][row["label"]]} for row in pair_rows()]
    train(config_of(run, bert_folder, rows, training={"num_epochs": 12, "learning_rate": 0.005}))
    assert losses_of(run)[-1] < losses_of(run)[0] / 3
    predictor = Predictor.open(run)
    assert predictor.model.backbone.path == "packed"
    pairs = [("good it broke", "good"), ("film", "film a lovely ending"), ("bad", "where my card was charged")]
    predicted = predictor.predict(pairs)
    padded = Predictor.open(run)
    padded.model.backbone.path = "padded"
    padded.model.backbone.model.set_attn_implementation("eager")
    for mine, theirs in zip(predicted, padded.predict(pairs), strict=True):
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
    # Segment ids matter: without them the same tokens give other outputs.
    encoded, _ = encode_labeled(predictor.tokenizer, prepared_pairs(pairs), max_length=None)
    assert encoded[0].token_types is not None
    assert sorted(set(encoded[0].token_types)) == [0, 1]
    ids, layout = torch.tensor(encoded[0].ids), PackedLayout((len(encoded[0].ids),))
    with torch.no_grad():
        with_types = predictor.model(ids, layout, torch.tensor(encoded[0].token_types))
        without = predictor.model(ids, layout, None)
    assert (with_types - without).abs().max() > 1e-3


def prepared_pairs(pairs: list[tuple[str, str]]) -> list[Any]:
    from loopos.data.formats import Labeled
    from loopos.data.rows import Row

    return [Labeled(first, second, None, Row({}, "pairs", None, i)) for i, (first, second) in enumerate(pairs)]


# What the labels show to be wrong in the config -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "training", "summary"),
    [
        ({"class_weights": [1.0, 2.0]}, {}, "model.class_weights: got 2 weights for 3 classes"),
        ({"regression_loss": "huber"}, {}, "model.regression_loss"),
        ({}, {"metric": "mae"}, 'training.metric: got "mae" with task classification'),
    ],
)
def test_keys_that_contradict_the_labels_are_diagnostics(
    model: dict[str, Any], training: dict[str, Any], summary: str, home: Path, pico_folder: Path
) -> None:
    config = config_of(home / "contradiction", pico_folder, class_rows(24), model=model, training=training)
    assert not list(config.check()), "the config alone cannot tell"
    with pytest.raises(ConfigError) as caught:
        train(config)
    assert summary in str(caught.value)
    assert "say task: classification, 3 outputs" in str(caught.value)
    assert not (home / "contradiction" / "events.jsonl").exists()


def test_a_second_run_in_the_folder_is_refused_and_the_config_is_unchanged(home: Path, pico_folder: Path) -> None:
    run = home / "kept"
    config = config_of(run, pico_folder, class_rows(24), training={"num_epochs": 1})
    train(config)
    written = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        train(config)
    other = config_of(run, pico_folder, class_rows(24), training={"num_epochs": 1, "optimizer": "sgd"})
    with pytest.raises(UserError, match=r"training\.optimizer: was adamw, is sgd"):
        train(other, resume=True)
    head = config_of(run, pico_folder, class_rows(24), training={"num_epochs": 1, "trainable": "head"})
    with pytest.raises(UserError, match=r"training\.trainable: was all, is head"):
        train(head, resume=True)
    assert (run / "config.json").read_bytes() == written


def test_the_account_of_rows_and_tokens_is_in_the_log(home: Path, pico_folder: Path) -> None:
    run = home / "account"
    train(config_of(run, pico_folder, class_rows(40), training={"num_epochs": 1, "max_length": 6}))
    session = events_of(run, "session")[0]["metrics"]
    tokens = session["tokens"]
    assert session["rows"][0].startswith("40 rows read, 40 used")
    assert tokens["training"]["examples"] + tokens["validation"]["examples"] == 40
    assert tokens["training"]["truncated"] > 0
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    read = sum(len(tokenizer(row["text"])["input_ids"]) for row in class_rows(40))
    assert sum(part["tokens"] + part["tokens_cut"] for part in tokens.values()) == read
    # One epoch trains every kept token once.
    assert events_of(run, "step")[-1]["metrics"]["tokens"] == tokens["training"]["tokens"]
