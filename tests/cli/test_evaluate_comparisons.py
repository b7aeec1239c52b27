"""`loopos evaluate` on comparisons: a policy's implicit rewards and a reward model's scores, beside what their runs measured
and numbers made by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from loopos.methods.preference import PreferenceTrainer
from loopos.methods.reward_model import RewardModelTrainer
from loopos.training.progress import RunProgress
from tests.cli.conftest import Invoke, write_jsonl
from tests.preference_runs import comparisons, events_of, preference_config, reward_config

CPU = ("--device", "cpu")
HELD_OUT = [{**row, "prompt": f"{row['prompt']} please"} for row in comparisons(15)]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "held_out.jsonl", HELD_OUT)


def trained(folder: Path, weights: Path, held_out: Path, method: str, **training: Any) -> Path:
    """A run that exports its last weights, which its last validation measured."""
    run = folder / f"{method}-{training.get('trainable', 'all')}"
    settings = {"num_epochs": 1, "keep_best": False, "learning_rate": 2e-3, **training}
    data = {"validation_data": str(held_out), "validation_share": 0.0}
    config = preference_config(run, weights, method, training=settings, data=data)
    PreferenceTrainer(config, progress=RunProgress(quiet=True)).train()
    return run


@pytest.fixture(scope="module")
def dpo_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path, held_out: Path) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), pico_folder, held_out, "dpo")


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "reward"
    config = reward_config(run, pico_folder, rows=comparisons(10), training={"num_epochs": 1})
    RewardModelTrainer(config, progress=RunProgress(quiet=True)).train()
    return run


def found(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def check_against_validation(run: Path, metrics: dict[str, float]) -> None:
    """The last validation of the run measured the same rows and weights."""
    last = events_of(run, "validation")[-1]
    names = {"pair_accuracy": "accuracy"}
    same = ["pair_accuracy", "ties", "loss", "reward_margin", "rewards_chosen", "rewards_rejected", "logprob_chosen"]
    for name in (*same, "logprob_rejected", "length_chosen", "length_rejected"):
        assert metrics[name] == pytest.approx(last[names.get(name, name)], abs=2e-4), name
    assert metrics["pair_accuracy_low"] < metrics["pair_accuracy"] <= metrics["pair_accuracy_high"]


def test_a_policy_is_measured_as_its_run_measured_it(dpo_run: Path, held_out: Path, invoke: Invoke) -> None:
    answer = found(invoke("evaluate", dpo_run, held_out, "--json", *CPU))
    assert (answer["rows"], answer["dropped"], answer["beta"]) == (15, {}, 0.1)
    assert answer["reference"] == json.loads((dpo_run / "config.json").read_text())["data"]["pretrained_weights"]
    check_against_validation(dpo_run, answer["metrics"])
    metrics = answer["metrics"]
    assert metrics["likelihood_per_token_accuracy"] != metrics["pair_accuracy"] or metrics["likelihood_accuracy"] < 1
    assert sum(each["pairs"] for each in answer["by_margin"]) == 15


@pytest.mark.slow
def test_adapters_and_losses_without_a_reference(
    tmp_path: Path, pico_folder: Path, held_out: Path, invoke: Invoke
) -> None:
    lora = trained(tmp_path, pico_folder, held_out, "dpo", trainable="lora")
    check_against_validation(lora, found(invoke("evaluate", lora, held_out, "--json", *CPU))["metrics"])
    # SimPO's reward is the log-probability per token; its loss has a margin of its own.
    simpo = trained(tmp_path, pico_folder, held_out, "simpo")
    answer = found(invoke("evaluate", simpo, held_out, "--json", *CPU))
    last = events_of(simpo, "validation")[-1]
    assert (answer["reference"], answer["beta"]) == (None, 2.0)
    for name in ("rewards_chosen", "rewards_rejected", "reward_margin"):
        assert answer["metrics"][name] == pytest.approx(last[name], abs=2e-4)
    assert answer["metrics"]["pair_accuracy"] == last["accuracy"] == answer["metrics"]["likelihood_per_token_accuracy"]


def test_the_reference_may_be_named(dpo_run: Path, pico_folder: Path, held_out: Path, invoke: Invoke) -> None:
    own = found(invoke("evaluate", dpo_run, held_out, "--json", *CPU))
    named = found(invoke("evaluate", dpo_run / "model", held_out, "--reference", pico_folder, "--json", *CPU))
    assert named["metrics"] == own["metrics"]
    itself = found(invoke("evaluate", pico_folder, held_out, "--reference", pico_folder, "--json", *CPU))["metrics"]
    assert (itself["pair_accuracy"], itself["ties"], itself["reward_margin"]) == (0.5, 1.0, 0.0)
    assert itself["loss"] == pytest.approx(math.log(2))
    assert itself["brier"] == 0.25
    # A model without a run has no reference, and a run's may be left out.
    for model, words in ((pico_folder, ()), (dpo_run, ("--reference", "none"))):
        answer = found(invoke("evaluate", model, held_out, *words, "--json", *CPU))
        assert answer["reference"] is None
        assert answer["metrics"]["pair_accuracy"] == answer["metrics"]["likelihood_per_token_accuracy"]


def test_every_pair_is_written_with_the_largest_errors_first(
    dpo_run: Path, held_out: Path, tmp_path: Path, invoke: Invoke
) -> None:
    file, page = tmp_path / "pairs.csv", tmp_path / "report.html"
    result = invoke("evaluate", dpo_run, held_out, "-o", file, "--report", page, *CPU)
    assert result.exit_code == 0, result.stderr
    assert "reward: 0.1 · log π/ρ, reference " in result.stdout
    assert "pair_accuracy" in result.stdout
    with file.open(encoding="utf-8") as opened:
        records = list(csv.DictReader(opened))
    gaps = [float(each["gap"]) for each in records]
    assert len(records) == 15
    assert gaps == sorted(gaps)
    for each in records:
        row = HELD_OUT[int(each["line"]) - 1]
        assert (each["prompt"], each["preferred"], each["other"]) == (row["prompt"], row["chosen"], row["rejected"])
        assert float(each["gap"]) == pytest.approx(float(each["reward_preferred"]) - float(each["reward_other"]))
        assert each["correct"] == str(float(each["gap"]) > 0)
    assert "Calibration" in page.read_text(encoding="utf-8")


def test_a_reward_model_needs_no_detour(reward_run: Path, held_out: Path, tmp_path: Path, invoke: Invoke) -> None:
    """Its metrics are those of `loopos score`; certainty of people counts in calibration."""
    answer = found(invoke("evaluate", reward_run, held_out, "--json", *CPU))
    scored = found(invoke("score", reward_run, held_out, "--json", *CPU))
    assert {name: answer["metrics"][name] for name in scored if name != "rows"} == pytest.approx(
        {name: value for name, value in scored.items() if name != "rows"}, abs=1e-5
    )
    assert {"model", "data", "rows", "dropped", "metrics", "by_margin", "calibration", "seconds"} == set(answer)
    sure = [{**row, "p_human": 0.25 if number % 3 == 0 else 0.75} for number, row in enumerate(HELD_OUT)]
    file, pairs = write_jsonl(tmp_path / "sure.jsonl", sure), tmp_path / "pairs.jsonl"
    answer = found(invoke("evaluate", reward_run, file, "--json", "-o", pairs, *CPU))
    records = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    squares = [(1 / (1 + math.exp(-each["gap"])) - 0.75) ** 2 for each in records]
    assert answer["metrics"]["brier"] == pytest.approx(sum(squares) / len(squares))
    turned = [each for each in records if (each["line"] - 1) % 3 == 0]
    assert all(each["preferred"] == HELD_OUT[each["line"] - 1]["rejected"] for each in turned)
    assert len(turned) == 5
    assert [each["gap"] for each in records] == sorted(each["gap"] for each in records)


def test_rows_that_do_not_fit_are_dropped_and_counted(
    reward_run: Path, dpo_run: Path, tmp_path: Path, invoke: Invoke
) -> None:
    rows = [*HELD_OUT[:4], {**HELD_OUT[4], "chosen": "a kind answer " * 90}]
    file = write_jsonl(tmp_path / "long.jsonl", rows)
    for run in (reward_run, dpo_run):
        answer = found(invoke("evaluate", run, file, "--json", *CPU))
        assert (answer["rows"], list(answer["dropped"].values())) == (4, [1])
        assert found(invoke("evaluate", run, file, "--json", "--limit", 2, *CPU))["rows"] == 2


def test_mistakes_are_named(
    reward_run: Path, dpo_run: Path, pico_folder: Path, held_out: Path, tmp_path: Path, invoke: Invoke
) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "where is it"}])
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.json", "events.jsonl"):
        text = (dpo_run / name).read_text(encoding="utf-8")
        (moved / name).write_text(text.replace(str(pico_folder), str(tmp_path / "gone")), encoding="utf-8")
    (moved / "model").symlink_to(dpo_run / "model")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((reward_run, held_out, "--samples", 4), "--samples: does not apply to a reward model"),
        ((reward_run, held_out, "--reference", pico_folder), "--reference: does not apply to a reward model"),
        ((dpo_run, held_out, "--pass-k", 1), "--pass-k: does not apply to comparisons"),
        ((dpo_run, held_out, "--limit", 0), "--limit: got 0; expected 1 or more"),
        ((dpo_run, held_out, "--report", tmp_path / "page.txt"), "expected a file that ends in .html"),
        ((dpo_run, held_out, "--reference", "no/such/model"), "no/such/model"),
        ((dpo_run, held_out, "--reference", reward_run), "reward model"),
        ((reward_run, prompts), "prompts.jsonl"),
        ((dpo_run, prompts, "--reference", pico_folder), "prompts.jsonl"),
        ((moved, held_out), "name it with --reference, or use --reference none for likelihoods only"),
    ]
    for words, message in cases:
        result = invoke("evaluate", *words, *CPU)
        assert result.exit_code == 2, words
        assert message in result.stderr, words


def test_the_loss_of_conversations_may_still_be_measured(dpo_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    """Rows of UltraFeedback have messages beside chosen and rejected."""
    rows = [
        {**row, "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]}
        for row in HELD_OUT[:4]
    ]  # fmt: skip
    file = write_jsonl(tmp_path / "both.jsonl", rows)
    assert "perplexity" in found(invoke("evaluate", dpo_run, file, "--metric", "perplexity", "--json", *CPU))["metrics"]
