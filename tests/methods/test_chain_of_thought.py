"""Chain-of-thought training through its real entry point, on the pico model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.diagnostics import UserError
from loopos.evaluation.reasoning import Reasoner
from loopos.methods.chain_of_thought import ChainOfThought

PROBLEMS = [
    {"problem": f"add {a} and {b}", "reasoning": [f"{a} + {b} = {a + b}"], "answer": str(a + b)}
    for a in range(1, 5)
    for b in range(1, 5)
]
Configs = Callable[..., ChainOfThoughtConfig]


@pytest.fixture
def config(tmp_path: Path, pico_folder: Path, write_rows: Any) -> Configs:
    """Builds a config on the pico model; sections are keyword dictionaries that override small defaults."""

    def build(rows: list[dict[str, Any]] | None = None, **sections: dict[str, Any]) -> ChainOfThoughtConfig:
        file = write_rows("train.jsonl", PROBLEMS if rows is None else rows)
        written = {
            "computation": {"mode": "posttraining", "method": "chain_of_thought"},
            "training": {
                "learning_rate": 3e-3,
                "batch_size": 4,
                "num_epochs": 1,
                "precision": "fp32",
                "schedule": "constant",
                "warmup": 0,
            },
            "data": {
                "pretrained_weights": str(pico_folder),
                "reasoning_examples": str(file),
                "output_dir": str(tmp_path / "run"),
                "validation_share": 0.25,
            },
            "generation": {"max_new_tokens": 48},
            "evaluation": {"problems": 4},
        }
        for name, section in sections.items():
            written[name] = {**written.get(name, {}), **section} if name != "self_improvement" else section
        return ChainOfThoughtConfig.model_validate(written)

    return build


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def test_the_loss_is_that_of_transformers_on_the_same_rows(config: Configs, pico_folder: Path) -> None:
    method = ChainOfThought(config(training={"max_steps": 1, "shuffle": False, "batch_size": 6}))
    method.train()
    told = events(method.run_dir, "step")[0]["metrics"]
    reference = AutoModelForCausalLM.from_pretrained(pico_folder)
    rows = method.train_rows[:6]
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    learned = torch.tensor([(row.weights or []) + [0.0] * (longest - len(row.ids)) for row in rows]) > 0
    loss = reference(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~learned, -100)).loss
    loss.backward()
    assert told["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
    # transformers gives the pad token's row no gradient of the input embedding; no pad is in our rows.
    assert told["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_it_generates_what_it_learned(config: Configs) -> None:
    """One fact, learned by heart, comes back through the exported folder, in the step format, ended by its end token."""
    fact = [{"problem": "add 1 and 2", "reasoning": ["1 + 2 = 3"], "answer": "3"}] * 8
    method = ChainOfThought(
        config(fact, training={"num_epochs": 40, "learning_rate": 1e-2, "validate_every": 40, "optimizer": "adamw"})
    )
    result = method.train()
    assert result.best_metric == 1.0
    found = Reasoner.open(str(method.run_dir)).answer(["add 1 and 2"])[0]
    assert found.answer == "3"
    assert [step.text for step in found.chains[0].steps] == ["1 + 2 = 3"]
    assert found.chains[0].finish_reason == "stop"
    samples = [json.loads(line) for line in (method.run_dir / "samples.jsonl").read_text().splitlines()]
    assert samples[-1]["is_right"]
    assert samples[-1]["expected"] == "3"
    assert samples[0]["step"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ordinary", "special"])
def test_step_markers_may_be_special_tokens(kind: str, config: Configs, pico_folder: Path, tmp_path: Path) -> None:
    """What is learned by heart is read, whether or not the tokenizer calls the markers of the steps special."""
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    marks = ["<think>", "</think>"]
    if kind == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
    else:
        tokenizer.add_tokens(marks)
    model = AutoModelForCausalLM.from_pretrained(pico_folder)
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "marked")
    rows = [{"problem": "What?", "reasoning": ["2 + 5 is it"], "answer": "7"}] * 40
    method = ChainOfThought(
        config(
            rows,
            training={"num_epochs": 12, "learning_rate": 2e-2, "optimizer": "adamw"},
            data={"pretrained_weights": str(tmp_path / "marked")},
        )
    )
    assert method.train().best_metric == 1.0
    last = json.loads((method.run_dir / "samples.jsonl").read_text().splitlines()[-1])
    assert (last["text"], last["answer"], last["is_right"]) == ("<think>\n2 + 5 is it\n</think>\n7", "7", True)
    validation = events(method.run_dir, "validation")[-1]["metrics"]
    assert (validation["accuracy"], validation["format_rate"], validation["mean_steps"]) == (1.0, 1.0, 1.0)


def test_the_exported_folder_opens_in_transformers_and_uses_the_same_format(config: Configs) -> None:
    method = ChainOfThought(config())
    method.train()
    model = AutoModelForCausalLM.from_pretrained(method.run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(method.run_dir / "model")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "add 1 and 1"}], add_generation_prompt=True)
    ids = prompt["input_ids"] if not isinstance(prompt, list) else prompt
    reasoner = Reasoner.open(str(method.run_dir))
    assert ids == reasoner.prompt("add 1 and 1")
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    ours = reasoner.answer(["add 1 and 1"])[0].chains[0].token_ids[:12]
    assert greedy[: len(ours)] == ours


# peft asks transformers in a way that its next version drops.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_only_adapters_train_and_they_open_in_peft(config: Configs, pico_folder: Path) -> None:
    peft = pytest.importorskip("peft")
    method = ChainOfThought(config(training={"trainable": "lora", "learning_rate": 1e-2}))
    method.train()
    assert method.trained.now
    assert all(".lora_" in name for name in method.trained.now)
    base = AutoModelForCausalLM.from_pretrained(pico_folder)
    ids = torch.tensor([[5, 80, 120, 7]])
    before = base(input_ids=ids).logits
    adapted = peft.PeftModel.from_pretrained(base, method.run_dir / "adapter")(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(method.run_dir / "model", dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(adapted, merged, atol=2e-4, rtol=1e-4)
    assert float((merged - before).abs().max().detach()) > 1e-2


def test_accuracy_needs_problems_with_answers(config: Configs) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}] * 8
    with pytest.raises(UserError, match="metric accuracy"):
        ChainOfThought(config(rows, training={"metric": "accuracy"})).train()


def test_conversations_train_by_their_loss(config: Configs) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
        for word in ("lamp", "film", "order", "box", "march", "card", "room", "value")
    ]
    method = ChainOfThought(config(rows, training={"num_epochs": 3, "learning_rate": 1e-2}))
    result = method.train()
    validations = events(method.run_dir, "validation")
    assert "accuracy" not in validations[0]["metrics"]
    assert result.best_metric is not None
    assert result.best_metric < validations[0]["metrics"]["loss"]
    assert (result.beat_start, result.start_metric) == (True, validations[0]["metrics"]["loss"])
    # Of both validation conversations, at each validation: what was asked, what the data and the model answer.
    samples = [json.loads(line) for line in (method.run_dir / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [event["step"] for event in validations for _ in range(2)]
    assert all(sample["prompt"] == f"say {sample['reference']}" for sample in samples)
    # The exported weights are the last ones, and transformers writes with them what stands there.
    assert result.best_step == result.step
    model = AutoModelForCausalLM.from_pretrained(method.run_dir / "model", dtype=torch.float32)
    assert method.answers is not None
    prompt = torch.tensor([method.answers.reasoner.prompt(method.chats[1])])
    stops = list(method.template.stop_tokens)
    written = model.generate(prompt, max_new_tokens=48, do_sample=False, eos_token_id=stops, pad_token_id=0)[0]
    text = method.tokenizer.decode(written[prompt.shape[1] :], skip_special_tokens=True)
    assert samples[-1]["response"] == text


def test_rounds_keep_right_and_distinct_chains_and_train_on_them(config: Configs) -> None:
    rows = [*PROBLEMS[:4], *({**row, "reasoning": []} for row in PROBLEMS[:4])]
    method = ChainOfThought(
        config(
            rows,
            data={"validation_share": 0.0},
            training={"num_epochs": 30, "learning_rate": 1e-2, "optimizer": "adamw"},
            self_improvement={"rounds": 1, "samples_per_problem": 6, "temperature": 0.5},
        )
    )
    result = method.train()
    assert not result.interrupted
    folder = method.run_dir / "rounds" / "1"
    found = [json.loads(line) for line in (folder / "chains-0-of-1.jsonl").read_text().splitlines()]
    assert [line["problem"] for line in found] == [row["problem"] for row in rows]
    kept = sum(len(line["chains"]) for line in found)
    assert kept >= 1
    for line in found:
        assert len(line["chains"]) <= line["right"] <= 6
        assert len({tuple(chain) for chain in line["chains"]}) == len(line["chains"])
    told = events(folder, "session")[0]["metrics"]
    assert told["total_steps"] == 30 * -(-(4 + kept) // 4)


def test_a_round_without_a_right_chain_says_what_to_do(config: Configs) -> None:
    section = {"rounds": 1, "samples_per_problem": 2}
    with pytest.raises(UserError, match="rationalize"):
        ChainOfThought(config(training={"max_steps": 1}, self_improvement=section)).train()


def test_several_chains_a_problem_are_voted_on(config: Configs) -> None:
    method = ChainOfThought(
        config(
            training={"max_steps": 2, "validate_every": 2},
            generation={"strategy": "self_consistency:3", "temperature": 1.0},
        )
    )
    method.train()
    metrics = events(method.run_dir, "validation")[-1]["metrics"]
    assert {"accuracy", "sample_accuracy", "pass@3", "majority@3", "confidence", "format_rate"} <= set(metrics)
    assert metrics["accuracy"] == metrics["majority@3"]
