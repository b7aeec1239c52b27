"""Process reward models through their real entry point, on the pico model."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import NUM_KILLS, check_kills_leave_no_trace, digest
from preference_runs import comparisons, events_of, ppo_config, reward_config, write_rows
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer
from worlds import run_world, train_here

from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.diagnostics import DataError, UserError
from loopos.config.preferences import ProcessSection
from loopos.config.reward_model import RewardModelConfig
from loopos.data.conversations import Message
from loopos.data.rows import Row
from loopos.data.stepwise import Stepwise
from loopos.data.stepwise_tokens import EncodedStepwise, StepwiseRows, encode_steps
from loopos.data.supervised_tokens import RowPolicy, prompt_tokens
from loopos.evaluation.process_rewards import ChainText, Process, aggregated
from loopos.evaluation.reward_predictor import RewardPredictor, judged_content
from loopos.methods.ppo import PpoTrainer
from loopos.methods.reward_model import RewardModelTrainer
from loopos.models.folders import open_reward_model
from loopos.storage.events import fingerprint
from loopos.training.objectives import StepObjective
from loopos.training.progress import RunProgress

RIGHT = ("we change it for you", "it comes today", "thank you")
WRONG = ("nobody replies here", "just wait", "never again")


def answers(number: int) -> list[dict[str, Any]]:
    """Three steps each; after the first wrong one, every second row says no more."""
    rows: list[dict[str, Any]] = []
    for i in range(number):
        error = i % 4
        steps = [(RIGHT if step < error else WRONG)[(i + step) % 3] for step in range(3)]
        labels: list[bool | None] = [step < error for step in range(3)]
        if i % 2:
            labels = [label if step <= error else None for step, label in enumerate(labels)]
        rows.append({"prompt": f"where is my parcel {i}", "completions": steps, "labels": labels})
    return rows


def process_config(run: Path, weights: Path, **sections: Any) -> RewardModelConfig:
    training = {"learning_rate": 3e-3, "num_epochs": 6, **sections.pop("training", {})}
    return reward_config(run, weights, rows=answers(40), training=training, **sections)


def trained(config: RewardModelConfig) -> RewardModelTrainer:
    method = RewardModelTrainer(config, progress=RunProgress(quiet=True))
    method.train()
    return method


def two_classes(method: RewardModelTrainer, weights: Path) -> Any:
    """transformers' token classifier of two classes with the model's weights and the head (−w/2, w/2)."""
    # The model's own config names an attention that only LoopOS has.
    config = AutoConfig.from_pretrained(weights, num_labels=2)
    plain = AutoModelForTokenClassification.from_config(config).eval()
    getattr(plain, plain.base_model_prefix).load_state_dict(method.model.backbone.model.state_dict())
    with torch.no_grad():
        plain.score.weight.copy_(torch.cat([-method.model.head.weight / 2, method.model.head.weight / 2]))
        plain.score.bias.zero_()
    return plain


def test_loss_and_gradients_are_those_of_transformers_token_classifier(tmp_path: Path, pico_folder: Path) -> None:
    """The two-class cross-entropy at the separators, which TRL's PRMTrainer minimized."""
    method = trained(process_config(tmp_path / "run", pico_folder, training={"max_steps": 2}))
    rows = method.train_rows[:6]
    batch = StepwiseRows(rows)(range(6))
    objective = StepObjective(method.model)
    for parameter in method.model.parameters():
        parameter.requires_grad_(True)
    method.model.zero_grad()
    loss = objective.loss(batch)["loss"] / objective.counts(batch)["loss"]
    loss.backward()
    plain, longest = two_classes(method, pico_folder), max(len(row.ids) for row in rows)
    labels = torch.full((6, longest), -100)
    for number, row in enumerate(rows):
        for end, label in zip(row.ends, row.labels, strict=True):
            labels[number, end] = -100 if label is None else int(label)
    ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    expected = plain(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    assert sum(label is None for row in rows for label in row.labels) > 0
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = dict(getattr(plain, plain.base_model_prefix).named_parameters())
    ours = dict(method.model.backbone.model.named_parameters())
    assert len(ours) == len(theirs) > 10
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4)
    # The head is half the difference of the rows.
    assert method.model.head.weight.grad is not None
    difference = (plain.score.weight.grad[1:] - plain.score.weight.grad[:1]) / 2
    torch.testing.assert_close(method.model.head.weight.grad, difference, atol=1e-6, rtol=1e-4)


def test_step_labels_are_learned_and_said(
    tmp_path: Path, pico_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = process_config(
        tmp_path / "run", pico_folder, reward={"center_rewards": 0.1, "process": {"aggregation": "min"}}
    )
    RewardModelTrainer(config).train()
    printed = " ".join(capsys.readouterr().err.split())
    assert 'format: steps (prompt <- "prompt", completions <- "completions", labels <- "labels")' in printed
    # Of the 120 steps of both parts ten, behind the first error of their answer, have no label.
    counted = [(int(steps), int(labels)) for steps, labels in re.findall(r"(\d+) steps, (\d+) labeled", printed)]
    assert [steps for steps, _ in counted] == [96, 24]
    assert sum(labels for _, labels in counted) == 110
    assert "reward.center_rewards has no effect: the rows have step labels" in printed
    first, *_, last = events_of(tmp_path / "run", "validation")
    assert last["step_accuracy"] == last["first_error_accuracy"] == last["first_error_f1"] == last["step_auroc"] == 1.0
    assert last["loss"] < 0.2 < first["loss"]
    opened = open_reward_model(tmp_path / "run")
    process = {"step_separator": "\n", "aggregation": "min", "step_format": None, "answer_is_step": True}
    assert opened.description["process"] == process
    # A probability is not normalized.
    assert (opened.description["score_mean"], opened.description["score_std"]) == ([0.0], [1.0])


def test_the_counts_of_a_step_are_its_labeled_steps(tmp_path: Path, pico_folder: Path) -> None:
    """Law 1: accumulation and one batch take the same steps, though their micro-batches have different counts."""
    runs = {"whole": {"batch_size": 8}, "parts": {"batch_size": 2, "gradient_accumulation": 4}}
    for name, training in runs.items():
        trained(process_config(tmp_path / name, pico_folder, training={"max_steps": 4, **training}))
    whole, parts = (events_of(tmp_path / name, "step") for name in runs)
    assert len(whole) == len(parts) == 4
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["step_accuracy"] == pytest.approx(other["step_accuracy"], abs=1e-6)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path, pico_folder: Path) -> None:
    settings = {"max_steps": 3, "learning_rate": 1e-3, "validate_every": 3}
    train_here(process_config(tmp_path / "one", pico_folder, training={**settings, "batch_size": 8}))
    run_world(2, [(process_config(tmp_path / "two", pico_folder, training={**settings, "batch_size": 4}), False)])
    for kind in ("step", "validation"):
        one, two = (events_of(tmp_path / name, kind) for name in ("one", "two"))
        assert len(one) == len(two) > 0
        for each, other in zip(one, two, strict=True):
            assert each["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert each["step_accuracy"] == pytest.approx(other["step_accuracy"], abs=1e-6)


def bits_of(run: Path) -> dict[str, str]:
    last = max((run / "checkpoints").glob("step-*"))
    files = [*sorted(last.glob("*.safetensors")), *sorted((run / "model").glob("*.safetensors"))]
    return {**{f"{f.parent.name}/{f.name}": digest(f) for f in files}, "metrics": fingerprint(run / "events.jsonl")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_random_moments(tmp_path: Path, pico_folder: Path) -> None:
    training = {
        "num_epochs": 3,
        "save_every": 2,
        "validate_every": 3,
        "trainable": "lora",
        "lora": {"rank": 4, "dropout": 0.1},
    }

    def config(name: str) -> RewardModelConfig:
        return process_config(tmp_path / name, pico_folder, training=training)

    began = time.monotonic()
    RewardModelTrainer(config("whole"), progress=RunProgress(quiet=True)).train()
    seconds, expected = time.monotonic() - began, bits_of(tmp_path / "whole")
    assert len(expected) >= 4
    killed = config("killed")
    check_kills_leave_no_trace(
        lambda: RewardModelTrainer(killed, progress=RunProgress(quiet=True)).train(resume=True), tmp_path / "killed",
        bits_of, expected, kills=NUM_KILLS, seconds=seconds, latest=0.7, seed="process reward model",
    )  # fmt: skip


def test_another_separator_is_another_run(tmp_path: Path, pico_folder: Path) -> None:
    trained(process_config(tmp_path / "run", pico_folder, training={"max_steps": 2}))
    other = process_config(
        tmp_path / "run", pico_folder, training={"max_steps": 3}, reward={"process": {"step_separator": " ."}}
    )
    with pytest.raises(UserError, match=r"reward\.process\.step_separator"):
        RewardModelTrainer(other, progress=RunProgress(quiet=True)).train(resume=True)


def test_training_and_validation_rows_are_of_one_kind(tmp_path: Path, pico_folder: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", comparisons(8))
    config = process_config(
        tmp_path / "run", pico_folder, data={"validation_data": str(pairs), "validation_share": 0.0}
    )
    with pytest.raises(DataError, match="comparisons beside answers with step labels"):
        trained(config)


@pytest.mark.parametrize(("aggregation", "expected"), [("product", 0.5 * 0.8 * 0.25), ("min", 0.25), ("last", 0.8)])
def test_aggregation_by_hand(aggregation: Any, expected: float) -> None:
    """p = 1/2, 1/4 and 4/5 have the log odds 0, −log 3 and log 4."""
    assert aggregated([0.0, -math.log(3), math.log(4)], aggregation) == pytest.approx(expected, rel=1e-12)


def test_a_text_is_split_by_the_step_format_or_the_separator() -> None:

    def process(**keys: Any) -> Process:
        return Process.of(ProcessSection(**{"step_format": "think", **keys}))

    text = "<think>\n1 + 1 = 2\n2 + 1 = 3\n</think>\n3"
    assert process().steps_of(text) == ("1 + 1 = 2", "2 + 1 = 3", "3")
    assert process(answer_is_step=False).steps_of(text) == ("1 + 1 = 2", "2 + 1 = 3")
    assert process(step_format="hashes").steps_of("1 + 1 = 2\n#### 2") == ("1 + 1 = 2", "#### 2")
    assert process(step_format=None).steps_of("one\n\ntwo\n") == ("one", "two")
    assert process(step_format=None).steps_of("") == ("",)
    unfinished = ChainText("", "<think>\n1 + 1 = 2\n", ("1 + 1 = 2",), "")
    assert process().steps_of_chain(unfinished) == ("1 + 1 = 2",)


@pytest.fixture(scope="module")
def process_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    run = tmp_path_factory.mktemp("process") / "run"
    trained(process_config(run, pico_folder))
    return run


def test_ranked_chains_are_scored_as_they_were_trained(process_run: Path) -> None:
    """Every beginning of a chain has the scores of its steps in the whole: no step depends on what follows it."""
    predictor = RewardPredictor.open(str(process_run))
    row = answers(3)[2]
    steps = tuple(row["completions"])
    prompt, response = judged_content(row["prompt"], "\n".join(steps), as_text=False)
    [whole] = predictor.judge([(prompt, response)])
    assert [round(each) for each in whole.steps] == [1, 1, 0]
    assert whole.score == pytest.approx(math.prod(whole.steps), rel=1e-9)
    chains = [ChainText(prompt, "", steps[:number], "") for number in range(1, 4)]
    ranked = predictor.rank_chains(chains)
    for number, score in enumerate(ranked, start=1):
        assert score == pytest.approx(math.prod(whole.steps[:number]), rel=1e-4)
    # Another aggregation is an option where the model is used.
    by_last = RewardPredictor.open(str(process_run), aggregation="last").rank_chains(chains)
    assert by_last[1] == pytest.approx(whole.steps[1], rel=1e-4)


def test_steps_after_tokens_are_encoded_as_after_messages(process_run: Path, pico_folder: Path) -> None:
    """PPO has the ids of a prompt; they meet the same ids of steps."""
    rows, predictor = answers(4), RewardPredictor.open(str(process_run))
    given = [
        Stepwise(
            (Message("user", row["prompt"]),), tuple(row["completions"]), (None,) * 3, Row({}, "rows", None, index)
        )
        for index, row in enumerate(rows)
    ]
    expected = [row for row, _ in predictor.step_scores(given, RowPolicy("error")).values()]
    tokenizer = AutoTokenizer.from_pretrained(process_run / "model")
    prompts = [prompt_tokens(tokenizer, row["prompt"]) for row in rows]
    given_tokens = list(zip(prompts, [row["completions"] for row in rows], strict=True))
    found = encode_steps(tokenizer, given_tokens, separator="\n")
    assert found == [EncodedStepwise(row.ids, row.ends, [None] * 3, index) for index, row in enumerate(expected)]


def test_ppo_is_rewarded_by_the_steps(process_run: Path, pico_folder: Path, tmp_path: Path) -> None:
    config = ppo_config(tmp_path / "run", pico_folder, reward_model=process_run, training={"max_iterations": 1})
    PpoTrainer(config, progress=RunProgress(quiet=True)).train()
    [rollout] = events_of(tmp_path / "run", "rollout")
    assert 0 < rollout["reward"] < 1


def reasoning_config(run: Path, weights: Path, strategy: str, reward_model: Path) -> ChainOfThoughtConfig:
    rows = [{"problem": f"where is my parcel {i}", "reasoning": [RIGHT[i % 3]], "answer": str(i)} for i in range(8)]
    file = write_rows(run.parent / "problems.jsonl", rows)
    return ChainOfThoughtConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "chain_of_thought"},
            "training": {"learning_rate": 1e-3, "max_steps": 1, "precision": "fp32"},
            "data": {"pretrained_weights": str(weights), "reasoning_examples": str(file), "output_dir": str(run)},
            "generation": {
                "max_new_tokens": 24, "temperature": 1.0, "strategy": strategy, "max_reasoning_steps": 2,
                "max_step_tokens": 6, "reward_model": str(reward_model),
            },
            "evaluation": {"problems": 2},
        }
    )  # fmt: skip


@pytest.mark.slow
def test_validation_searches_with_the_scores_of_steps(
    process_run: Path, pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ChainText] = []
    ranked = RewardPredictor.rank_chains

    def recorded(self: RewardPredictor, chains: Sequence[ChainText]) -> list[float]:
        asked.extend(chains)
        return ranked(self, chains)

    monkeypatch.setattr(RewardPredictor, "rank_chains", recorded)
    train_here(reasoning_config(tmp_path / "run", pico_folder, "step_beam:2x2", process_run))
    assert any(not chain.answer and chain.steps for chain in asked), "no chain was scored before its end"
    assert events_of(tmp_path / "run", "validation")
    outcome = tmp_path / "outcome"
    trained(reward_config(outcome, pico_folder, training={"max_steps": 1}))
    with pytest.raises(UserError, match="scores whole responses, but step_beam ranks unfinished chains"):
        train_here(reasoning_config(tmp_path / "other", pico_folder, "step_beam:2x2", outcome))
    train_here(reasoning_config(tmp_path / "best", pico_folder, "best_of_n:2", outcome))
    assert events_of(tmp_path / "best", "validation")
