"""Distillation through the trainer: it learns from a teacher off and on policy, its losses are those of a plain padded
computation and of TRL, however a step is split."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distillation_runs import distillation_config, pico_teacher, trained
from preference_runs import events_of, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import loopos
from loopos.config.diagnostics import ConfigError, UserError
from loopos.methods.distillation import DistillationTrainer
from loopos.planning.dry_run import plan_of
from loopos.rl.distillation_rounds import is_written
from loopos.training.progress import RunProgress

LOSSES = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, pico_tokenizer: Path) -> Path:
    return pico_teacher(tmp_path_factory.mktemp("teacher"), pico_tokenizer)


@pytest.mark.parametrize(
    ("loss", "share"), [("forward_kl", 0.0), pytest.param("jsd", 0.5, marks=pytest.mark.slow), ("reverse_kl", 1.0)]
)
def test_the_student_nears_the_teacher(
    loss: str, share: float, tmp_path: Path, pico_folder: Path, teacher: Path
) -> None:
    sections: dict[str, Any] = {"distillation": {"loss": loss, "on_policy_fraction": share}}
    if share:
        sections["online"] = {"max_new_tokens": 8, "every": 2}
    training = {"num_epochs": 5, "validate_every": 9}
    trained(distillation_config(tmp_path / "run", pico_folder, teacher, training=training, **sections))
    first, *_, last = events_of(tmp_path / "run", "validation")
    name = "reverse_kl" if "reverse" in loss else "forward_kl"
    assert last[name] < 0.9 * first[name]
    assert last["perplexity"] == pytest.approx(math.exp(last["nll"]))
    rounds = events_of(tmp_path / "run", "rollout")
    # 18 rows in 5 passes, 2 steps of 4 rows a round.
    assert [event["written"] for event in rounds] == ([8 * share] * 12 if share else [])
    assert (tmp_path / "run" / "report.md").is_file()
    exported = loopos.load(tmp_path / "run")
    assert exported.model.config.hidden_size == 32


@pytest.mark.slow
def test_the_sampled_loss_learns(tmp_path: Path, pico_folder: Path, teacher: Path) -> None:
    sections = {
        "distillation": {"loss": "sampled_reverse_kl", "on_policy_fraction": 1.0},
        "online": {"max_new_tokens": 8, "every": 2},
        "training": {"num_epochs": 16, "batch_size": 16, "learning_rate": 3e-3, "validate_every": 30},
    }
    trained(distillation_config(tmp_path / "run", pico_folder, teacher, **sections))
    run = events_of(tmp_path / "run", "step")
    # The first step of a round samples from the policy that it trains.
    assert run[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert run[1]["ratio"] != pytest.approx(1.0, abs=1e-5)
    assert run[0]["loss"] == pytest.approx(run[0]["reverse_kl"], rel=1e-4)
    first, *_, last = events_of(tmp_path / "run", "validation")
    assert last["reverse_kl"] < first["reverse_kl"]
    early, late = (sum(event["reverse_kl"] for event in part) for part in (run[:6], run[-6:]))
    assert late < 0.95 * early


def opened(config: Any) -> DistillationTrainer:
    """A run before its first step."""
    method = DistillationTrainer(config, progress=RunProgress(quiet=True))
    method.load_data()
    method.build_model()
    method.fit = method.build_fit()
    return method


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
def test_the_first_step_is_that_of_padded_rows_in_transformers(
    loss: str, tmp_path: Path, pico_folder: Path, teacher: Path
) -> None:
    config = distillation_config(
        tmp_path / "run", pico_folder, teacher, training={"batch_size": 5, "shuffle": False},
        distillation={"loss": loss, "beta": 0.3, "temperature": 1.5},
    )  # fmt: skip
    method = opened(config)
    batch = method.fit.batches.step(method.fit.position.cursor)[0]
    found = method.objective.loss(batch)["loss"] / method.objective.counts(batch)["loss"]
    found.backward()
    rows = [method.train_rows[row] for row in batch.rows]
    longest = max(len(row.ids) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask[index, : len(row.ids)] = 1
    learned = torch.zeros(len(rows), longest)
    for index, row in enumerate(rows):
        learned[index, : len(row.ids)] = torch.tensor(row.weights)
    student, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pico_folder, teacher))
    p, q = (model(input_ids=ids, attention_mask=mask).logits[:, :-1] / 1.5 for model in (student, other))
    log_p, log_q = F.log_softmax(p, -1), F.log_softmax(q.detach(), -1)
    log_m = torch.log(0.3 * log_q.exp() + 0.7 * log_p.exp())
    each = {
        "forward_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "jsd": 0.3 * (log_q.exp() * (log_q - log_m)).sum(-1) + 0.7 * (log_p.exp() * (log_p - log_m)).sum(-1),
    }[loss]
    expected = (each * learned[:, 1:]).sum() / learned.sum()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    own = {name: weight.grad for name, weight in method.model.causal.named_parameters()}
    for name, weight in student.named_parameters():
        torch.testing.assert_close(own[name], weight.grad, atol=1e-6, rtol=1e-3)
    assert all(weight.grad is None for weight in method.teacher.parameters())


@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_micro_batches_and_accumulation_are_one_step(
    share: float, tmp_path: Path, pico_folder: Path, teacher: Path
) -> None:
    for name, size, accumulation in (("one", 8, 1), ("eight", 1, 8)):
        training = {
            "batch_size": size, "gradient_accumulation": accumulation, "max_steps": 3, "optimizer": "sgd",
            "learning_rate": 0.05,
        }  # fmt: skip
        trained(
            distillation_config(
                tmp_path / name, pico_folder, teacher, training=training, online={"max_new_tokens": 6},
                distillation={"loss": "jsd", "on_policy_fraction": share},
            )
        )  # fmt: skip
    one, *others = (events_of(tmp_path / name, "step") for name in ("one", "eight"))
    assert len(one) == 3
    for other in others:
        for mine, theirs in zip(one, other, strict=True):
            assert theirs == pytest.approx(mine, abs=2e-5)


def test_lora_trains_adapters_and_the_plan_has_the_teacher(tmp_path: Path, pico_folder: Path, teacher: Path) -> None:
    training = {"trainable": "lora", "lora": {"rank": 4, "dropout": 0.1}, "max_steps": 8}
    config = distillation_config(
        tmp_path / "run", pico_folder, teacher, training=training, distillation={"on_policy_fraction": 0.5},
        online={"max_new_tokens": 6, "every": 2},
    )  # fmt: skip
    plan = plan_of(config, trust_remote_code=False)
    weights = AutoModelForCausalLM.from_pretrained(teacher)
    assert plan["memory"]["teacher"] == 4 * sum(weight.numel() for weight in weights.parameters())
    assert plan["steps"]["all"] == 8
    assert plan["time"]["left_out"] == ["writing answers"]
    trained(config)
    first, *_, last = events_of(tmp_path / "run", "validation")
    assert last["forward_kl"] < first["forward_kl"]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_the_share_of_written_rows_is_spread_evenly() -> None:
    for share in (0.0, 0.1, 0.3, 0.5, 2 / 3, 1.0):
        written = [is_written(number, share) for number in range(3000)]
        for size in (10, 30, 300):
            for first in range(0, 3000, size):
                assert abs(sum(written[first : first + size]) - size * share) < 1


def test_another_tokenizer_is_refused(tmp_path: Path, pico_folder: Path, teacher: Path) -> None:
    other = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["<more>"])
    larger = AutoModelForCausalLM.from_pretrained(teacher)
    larger.resize_token_embeddings(len(tokenizer))
    larger.save_pretrained(other)
    tokenizer.save_pretrained(other)
    config = distillation_config(tmp_path / "run", pico_folder, other)
    expected = r"data.teacher: .*other: its tokenizer has other tokens than the student's \(\d+ and \d+\)"
    with pytest.raises(UserError, match=expected):
        trained(config)


def test_texts_have_no_prompt_to_answer(tmp_path: Path, pico_folder: Path, teacher: Path) -> None:
    rows = [{"text": f"the lamp {number}"} for number in range(12)]
    trained(distillation_config(tmp_path / "off", pico_folder, teacher, rows=rows, training={"max_steps": 1}))
    config = distillation_config(
        tmp_path / "on", pico_folder, teacher, rows=rows, distillation={"on_policy_fraction": 0.5}
    )
    with pytest.raises(UserError, match=r"on.jsonl:\d+: got plain text with distillation.on_policy_fraction 0.5"):
        trained(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.teacher": None, "distillation.on_policy_fraction": 0.5}, "data.teacher: got no teacher with on_policy_"),
        ({"data.teacher": None, "distillation.temperature": 2.0}, "distillation.temperature: got 2 without a teacher"),
        ({"data.teacher": "new"}, 'data.teacher: got "new"'),
        ({"data.teacher": "./nowhere"}, 'data.teacher: got "./nowhere"'),
        ({"distillation.loss": "sigmoid"}, "distillation.loss"),
        ({"distillation.beta": 1.0}, "distillation.beta: got 1"),
        ({"distillation.loss": "sampled_reverse_kl"}, "distillation.on_policy_fraction: got 0 with sampled_reverse_kl"),
        (
            {
                "distillation.loss": "sampled_reverse_kl", "distillation.on_policy_fraction": 1.0,
                "online": {"temperature": 0.7},
            },
            "online.temperature: got 0.7 with sampled_reverse_kl; expected 1, that of distillation.temperature",
        ),
        (
            {"distillation.on_policy_fraction": 1.0, "training.max_length": 32, "online": {"max_new_tokens": 32}},
            "online.max_new_tokens: got 32; expected fewer than max_length (32)",
        ),
        ({"distributed": {"mode": "shard"}}, "distributed.mode: got a sharded model with distillation"),
        ({"training.metric": "accuracy"}, "training.metric"),
    ],
)  # fmt: skip
def test_mistakes_name_their_key(
    changes: dict[str, Any], message: str, tmp_path: Path, pico_folder: Path, teacher: Path
) -> None:
    written = distillation_config(tmp_path / "run", pico_folder, teacher).model_dump(mode="json")
    for key, value in changes.items():
        *sections, name = key.split(".")
        target = written
        for section in sections:
            target = target[section]
        target[name] = value
    file = write_rows(tmp_path / "config.json", [written])
    with pytest.raises(ConfigError) as problem:
        loopos.read_config(file)
    assert message in str(problem.value)
