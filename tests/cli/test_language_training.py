"""The command line around training language models: preview, dry run, and the last line of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.cli.data_preview import CONTEXT, CUT, LEARNED, fates
from loopos.planning import dry_run
from loopos.planning.estimate import Architecture, cache_bytes, logit_bytes, training_seconds
from tests.cli.conftest import Invoke, write_jsonl
from tests.cli.test_estimate import SMALL

SMALL_RUN = {"learning_rate": 0.001, "batch_size": 4, "num_epochs": 2, "precision": "fp32", "device": "cpu"}


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "measured_rates", lambda device, half: (1e9, 1e9))


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """A config of chain-of-thought training on twelve sums, three of them for validation."""
    folder = tmp_path_factory.mktemp("reasoning")
    rows = [
        {"problem": f"{i} + {i}", "reasoning": [f"twice {i}", "done"], "answer": str(2 * i), "level": i}
        for i in range(12)
    ]
    write_jsonl(folder / "train.jsonl", rows[:9])
    write_jsonl(folder / "validation.jsonl", rows[9:])
    config = {
        "computation": {"mode": "posttraining", "method": "chain_of_thought"},
        "training": SMALL_RUN,
        "data": {
            "pretrained_weights": str(pico_folder),
            "reasoning_examples": str(folder / "train.jsonl"),
            "validation_data": str(folder / "validation.jsonl"),
            "output_dir": str(folder / "run"),
        },
        "generation": {"max_new_tokens": 6},
        "evaluation": {"problems": 2},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    documents = [f"the parcel {i} came late and the box was open" for i in range(10)]
    (folder / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    config = {
        "model": {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 64, "vocab_size": 280},
        "computation": {"mode": "pretraining", "method": "autoregressive"},
        "training": {**SMALL_RUN, "max_length": 8},
        "data": {
            "input_file": str(folder / "text.txt"),
            "output_dir": str(folder / "run"),
            "output_weights": str(folder / "weights"),
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_what_becomes_of_each_token() -> None:
    assert fates([False, True, True], 2) == [CONTEXT, LEARNED, CUT]
    assert fates([False, True], 0) == [CUT, CUT]


def test_preview_marks_what_is_learned(reasoning: Path, invoke: Invoke) -> None:
    result = invoke("data", "preview", reasoning / "config.json", "--rows", 1)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{reasoning / 'train.jsonl'}:1"
    context, _, learned = lines[1].partition("[")
    assert context.replace("|", "").endswith("###·Assistant:\\n")
    assert learned.replace("|", "") == "<think>\\ntwice·0\\ndone\\n</think>\\n0<eos>]"
    assert lines[2] == f"{lines[1].count('|') + 2} tokens, {learned.count('|') + 1} learned"
    assert "train: 9 rows read, 9 used" in result.stdout
    assert "validation: 3 rows read, 3 used" in result.stdout


def test_preview_of_only_the_answer(reasoning: Path, invoke: Invoke) -> None:
    result = invoke("data", "preview", reasoning / "config.json", "--rows", 1, "data.train_on=answer")
    assert result.stdout.splitlines()[1].endswith("[0|<eos>]")


def test_preview_shows_what_is_cut_and_what_is_dropped(reasoning: Path, invoke: Invoke) -> None:
    cut = invoke("data", "preview", reasoning / "config.json", "training.max_length=40", "data.over_length=cut")
    lines = cut.stdout.splitlines()
    assert lines[1].endswith("<eos>~")
    assert "cut at 40" in lines[2]
    assert "9 cut at 40" in cut.stdout
    dropped = invoke("data", "preview", reasoning / "config.json", "training.max_length=40", "data.max_dropped_share=1")
    assert dropped.exit_code == 2
    assert "dropped: over max_length 40" in dropped.stdout
    assert "9 dropped (over max_length)" in dropped.stderr


def test_preview_shows_weights(reasoning: Path, tmp_path: Path, invoke: Invoke) -> None:
    summary = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "ab", "weight": 0.5}]
    file = write_jsonl(tmp_path / "said.jsonl", [{"messages": summary}] * 2)
    words = (f"data.reasoning_examples={file}", "data.validation_data=null", "data.validation_share=0")
    result = invoke("data", "preview", reasoning / "config.json", "--rows", 1, *words)
    assert result.exit_code == 0, result.stderr
    assert "3 learned, 3 with weight 0.5" in result.stdout


def test_preview_of_pretraining(pretraining: Path, invoke: Invoke) -> None:
    result = invoke("data", "preview", pretraining / "config.json", "--rows", 2)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "chunk 1, of document 1"
    assert lines[2] == "8 tokens, 7 learned"
    # The second piece begins with the last token of the first, as context.
    assert lines[5].split("[")[0] == lines[1].rstrip("]").split("|")[-1]


@pytest.mark.usefixtures("known_rates")
def test_a_dry_run_counts_what_the_run_then_does(reasoning: Path, invoke: Invoke) -> None:
    plan = json.loads(invoke("train", reasoning / "config.json", "--dry-run", "--json").stdout)
    # As the fine-tuned pico model without its head: the output embedding is the embedding, or one of its own.
    from transformers import AutoConfig, AutoModelForCausalLM

    source = json.loads((reasoning / "config.json").read_text(encoding="utf-8"))["data"]["pretrained_weights"]
    model = AutoModelForCausalLM.from_pretrained(source)
    assert plan["model"]["parameters"] == plan["model"]["trained"] == sum(p.numel() for p in model.parameters())
    assert plan["rows"] == {"train": 9, "validation": 3}
    assert plan["steps"] == {"epoch": 3, "all": 6, "trainings": 1}
    vocabulary = AutoConfig.from_pretrained(source).vocab_size
    assert plan["memory"]["logits"] == 256 * vocabulary * 12 + 8 * vocabulary * 32
    assert not (reasoning / "run").exists()
    result = invoke("train", reasoning / "config.json", "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    ended: dict[str, Any] = json.loads(result.stdout)
    assert (ended["step"], ended["tokens"]) == (plan["steps"]["all"], plan["tokens"]["all"])
    session = json.loads((reasoning / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert session["metrics"]["tokens"]["training"]["trained_tokens"] == plan["tokens"]["learned"]


@pytest.mark.usefixtures("known_rates")
def test_rounds_of_self_improvement_are_counted(reasoning: Path, invoke: Invoke) -> None:
    words = ("train", reasoning / "config.json", "data.output_dir=elsewhere", "--dry-run", "--json")
    one = json.loads(invoke(*words).stdout)
    three = json.loads(invoke(*words, 'self_improvement={"rounds": 2}').stdout)
    assert three["steps"]["trainings"] == 3
    assert three["time"]["seconds"] == pytest.approx(3 * one["time"]["seconds"])
    # Two kept a training (the last, the best), and one more while it is written.
    assert (one["disk"]["checkpoints"], three["disk"]["checkpoints"]) == tuple(
        number * one["disk"]["checkpoint"] for number in (3, 7)
    )


@pytest.mark.usefixtures("known_rates")
def test_a_dry_run_of_pretraining(pretraining: Path, invoke: Invoke) -> None:
    result = invoke("train", pretraining / "config.json", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    # Two layers of d 32 with 4 heads, d_ff 64, two norms each; 280 embeddings, tied; a norm.
    assert plan["model"]["parameters"] == 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 280 * 32 + 32
    assert plan["tokens"]["learned"] < plan["tokens"]["epoch"]
    assert not (pretraining / "run").exists()


def test_the_last_line_of_a_run_says_how_to_ask(reasoning: Path, invoke: Invoke) -> None:
    folder = reasoning / "second"
    words = (f"data.output_dir={folder}", "training.max_steps=1", "evaluation.problems=0", "--quiet")
    result = invoke("train", reasoning / "config.json", *words)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f'  generate with it: loopos generate {folder} -p "..." --steps'


def test_schema_knows_chain_of_thought(invoke: Invoke) -> None:
    described = json.loads(invoke("schema", "--method", "chain_of_thought").stdout)
    assert {"generation", "evaluation", "self_improvement"} <= set(described["properties"])


def test_logits_of_a_chunk_and_the_gradient_of_the_output_embedding() -> None:
    assert logit_bytes(width=4, vocabulary=10, number_bytes=2, trains_output=False) == 256 * 10 * (4 + 2 + 2)
    assert logit_bytes(width=4, vocabulary=10, number_bytes=2, trains_output=True) == 256 * 10 * 8 + 10 * 4 * (4 + 2)


def test_keys_and_values_of_generated_rows() -> None:
    shape = Architecture(width=4, key_width=2, feed_forward=8, heads=2, layers=0)
    # 3 rows of 5 tokens, each with a key and a value of 2 numbers in 2 layers.
    assert cache_bytes(shape, layers=2, rows=3, columns=5, number_bytes=2) == 3 * 5 * 2 * 2 * 2 * 2


def test_targets_are_multiplied_with_the_output_embedding() -> None:
    def seconds(**more: Any) -> float:
        return training_seconds(
            SMALL, tokens=0, validation_tokens=0, steps=0, optimizer_state=0, backward_fraction=1.0,
            operations_a_second=1 / 0.55, bytes_a_second=1.0, output=40, **more,
        )  # fmt: skip

    assert seconds(targets=10) == pytest.approx(10 * 3 * 2 * 40)
    assert seconds(targets=10, trains_output=False) == pytest.approx(10 * 2 * 2 * 40)
    assert seconds(validation_targets=10) == pytest.approx(10 * 2 * 40)
