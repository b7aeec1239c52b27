"""Supervised fine-tuning through the command line: every kind of rows, the numbers of chain_of_thought, exact resume."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from killed_runs import NUM_KILLS, check_kills_leave_no_trace
from pico_runs import events_of, last_weights, slow_but
from test_chain_of_thought_resume import bits_of

import loopos
from loopos.cli.app import main
from loopos.cli.opened_models import use_of
from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.diagnostics import UserError
from loopos.config.sft import SftConfig
from loopos.data.conversations import Conversation
from loopos.methods.chain_of_thought import ChainOfThought
from loopos.methods.sft import SftTrainer
from loopos.storage.events import read
from loopos.training.progress import RunProgress

NAMES = ("lamp", "film", "card", "order", "box", "hour", "waiter", "march")


def chat(name: str, *, system: str | None = None) -> list[dict[str, str]]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": f"say {name}"}, {"role": "assistant", "content": f"the {name}"}]


TOOLS = [{"type": "function", "function": {"name": "find", "description": "Find a box.", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "find", "arguments": {}}}
KINDS: dict[str, list[dict[str, Any]]] = {
    "conversations": [{"messages": chat(name, system="Be brief.")} for name in NAMES],
    "instructions": [{"instruction": "say it", "input": name, "output": f"the {name}"} for name in NAMES],
    "completions": [{"prompt": f"say {name}: ", "completion": f"the {name}"} for name in NAMES],
    "texts": [{"text": f"the {name} came late"} for name in NAMES],
    "questions": [{"question": f"what is a {name}?", "answer": f"the {name}"} for name in NAMES],
    "steps": [{"problem": f"{n} + 1", "reasoning": [f"{n}, then {n + 1}"], "answer": str(n + 1)} for n in range(8)],
    "tool calls": [
        {
            "messages": [
                {"role": "user", "content": f"find the {name}"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": f"{name} found", "name": "find"},
                {"role": "assistant", "content": f"the {name}"},
            ],
            "tools": TOOLS,
        }
        for name in NAMES
    ],
}
# What the sample of the report shows as reference; texts ask nothing.
REFERENCES = {
    "conversations": "the ",
    "instructions": "the ",
    "completions": "the ",
    "questions": "the ",
    "steps": "<think>\n",
    "tool calls": "the ",
}
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def sections_of(run: Path, weights: Path, rows: list[dict[str, Any]], **training: Any) -> dict[str, Any]:
    """A short run of sft, whose rows are written beside it."""
    file = run.parent / f"{run.name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = {
        "learning_rate": 1e-3,
        "batch_size": 3,
        "num_epochs": 1,
        "precision": "fp32",
        "device": "cpu",
        "seed": 7,
        "schedule": "constant",
        "warmup": 0,
    }
    return {
        "computation": {"mode": "posttraining", "method": "sft"},
        "training": {**small, **training},
        "data": {
            "pretrained_weights": str(weights),
            "training_data": str(file),
            "output_dir": str(run),
            "validation_share": 0.25,
        },
        "generation": {"max_new_tokens": 4},
    }


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of `loopos WORDS`."""
    monkeypatch.setattr(sys, "argv", ["loopos", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("kind", slow_but(["conversations", "tool calls"], KINDS))
def test_each_kind_of_rows_trains_by_the_command_line(
    kind: str, tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, config = tmp_path / "run", tmp_path / "run.json"
    sections = sections_of(run, pico_folder, KINDS[kind])
    if kind == "tool calls":
        (tmp_path / "chat.jinja").write_text(TOOL_TEMPLATE, encoding="utf-8")
        sections["data"]["chat_template"] = str(tmp_path / "chat.jinja")
    config.write_text(json.dumps(sections), encoding="utf-8")
    for words in (("validate",), ("data", "preview"), ("train", "--dry-run"), ("train", "--quiet")):
        name, options = [each for each in words if "-" not in each], [each for each in words if "-" in each]
        assert command(monkeypatch, *name, config, *options) == 0, capfd.readouterr().err
    assert "valid (posttraining, sft)" in capfd.readouterr().out
    validations = events_of(run, "validation")
    assert [event["step"] for event in validations] == [0, 2]
    assert validations[1]["metrics"]["loss"] < validations[0]["metrics"]["loss"]
    assert json.loads((run / "model" / "loopos.json").read_text())["method"] == "sft"
    if kind not in REFERENCES:
        assert not (run / "samples.jsonl").exists()
        return
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 2, 2]
    assert all(sample["reference"].startswith(REFERENCES[kind]) for sample in samples)
    assert loopos.load(str(run), "language").generate(["say film"])
    assert use_of(str(run)) == f'generate with it: loopos generate {run} -p "..."'


def trainer_of(sections: Mapping[str, Any]) -> SftTrainer[SftConfig]:
    return SftTrainer(SftConfig.model_validate(sections), progress=RunProgress(quiet=True))


def reasoning_of(sections: Mapping[str, Any]) -> ChainOfThought:
    written = {**sections, "computation": {"mode": "posttraining", "method": "chain_of_thought"}}
    return ChainOfThought(ChainOfThoughtConfig.model_validate(written), progress=RunProgress(quiet=True))


@pytest.mark.parametrize(
    "kind", slow_but(["texts", "steps"], [kind for kind in KINDS if kind not in ("questions", "tool calls")])
)
def test_the_numbers_are_those_of_chain_of_thought(kind: str, tmp_path: Path, pico_folder: Path) -> None:
    """One trainer: the same rows give the same losses, gradients and weights to the bit."""
    ours, theirs = (sections_of(tmp_path / name, pico_folder, KINDS[kind]) for name in ("sft", "cot"))
    trainer_of(ours).train()
    reasoning_of({**theirs, "evaluation": {"problems": 0}}).train()
    found, expected = (
        [(event["step"], event["metrics"]) for event in events_of(tmp_path / name, "step")] for name in ("sft", "cot")
    )
    assert len(found) == 2
    assert found == expected
    weights, others = last_weights(tmp_path / "sft"), last_weights(tmp_path / "cot")
    assert weights.keys() == others.keys()
    assert all(weights[name].equal(others[name]) for name in weights)


def test_a_question_without_steps_is_answered_without_thinking(tmp_path: Path, pico_folder: Path) -> None:
    trainer = trainer_of(sections_of(tmp_path / "run", pico_folder, KINDS["questions"]))
    trainer.load_data()
    assert all(isinstance(example, Conversation) for example in trainer.data.train)
    texts = [trainer.tokenizer.decode(row.ids) for row in trainer.train_rows]
    assert len(texts) == 6
    assert not any("<think>" in text for text in texts)
    learned = [
        trainer.tokenizer.decode([i for i, w in zip(row.ids, row.weights or [], strict=True) if w])
        for row in trainer.train_rows
    ]
    assert all(text.startswith("the ") and text.endswith("<eos>") for text in learned)
    # Among rows with steps, all are written alike.
    mixed = [*KINDS["steps"][:7], {"problem": "8 + 1", "reasoning": [], "answer": "9"}]
    trainer = trainer_of({**sections_of(tmp_path / "mixed", pico_folder, mixed)})
    trainer.load_data()
    assert all("</think>" in trainer.tokenizer.decode(row.ids) for row in trainer.train_rows)


def test_own_metrics_see_the_samples(tmp_path: Path, pico_folder: Path) -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def length(answers: list[str], references: list[str]) -> float:
        seen.append((answers, references))
        return float(sum(map(len, references)))

    config = sections_of(tmp_path / "run", pico_folder, KINDS["conversations"], metric="length")
    loopos.train(config, metrics={"length": length}, quiet=True)
    assert len(seen) == 2
    assert all(len(answers) == len(references) == 2 for answers, references in seen)
    measured = [event["metrics"]["length"] for event in events_of(tmp_path / "run", "validation")]
    assert measured == [sum(map(len, references)) for _, references in seen]
    texts = sections_of(tmp_path / "texts", pico_folder, KINDS["texts"], metric="length")
    with pytest.raises(UserError, match="no validation row asks for an answer; expected conversations or prompts"):
        loopos.train(texts, metrics={"length": length}, quiet=True)


def test_a_run_from_when_sft_was_another_name_of_chain_of_thought_resumes(tmp_path: Path, pico_folder: Path) -> None:
    """Its checkpoint says chain_of_thought. The other settings and the rows still decide whether it is the same run."""
    rows, whole = KINDS["conversations"], {"num_epochs": 4, "save_every": 1}
    trainer_of(sections_of(tmp_path / "whole", pico_folder, rows, **whole)).train()
    old = sections_of(tmp_path / "old", pico_folder, rows, **whole, max_steps=3)
    reasoning_of(old).train()
    del old["training"]["max_steps"]
    trainer_of(old).train(resume=True)
    sessions = [event["metrics"] for event in read(tmp_path / "old" / "events.jsonl") if event["event"] == "session"]
    assert sessions[1]["changed"]["computation.method"] == ["chain_of_thought", "sft"]
    found, expected = (last_weights(tmp_path / name) for name in ("old", "whole"))
    assert all(found[name].equal(expected[name]) for name in expected)
    # The other way it is another method, with other keys.
    with pytest.raises(UserError, match=r"computation\.method: was sft, is chain_of_thought"):
        reasoning_of(sections_of(tmp_path / "whole", pico_folder, rows, **whole)).train(resume=True)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_random_moments(tmp_path: Path, pico_folder: Path) -> None:
    training = {"num_epochs": 4, "validate_every": 6, "save_every": 4, "schedule": "cosine", "keep_last": 2}
    config = sections_of(tmp_path / "whole", pico_folder, KINDS["conversations"] * 2, **training)
    config["generation"]["temperature"] = 0.7
    began = time.monotonic()
    trainer_of(config).train()
    seconds = time.monotonic() - began
    expected = bits_of(tmp_path / "whole")
    assert "samples.jsonl" in expected
    killed = {**config, "data": {**config["data"], "output_dir": str(tmp_path / "killed")}}
    check_kills_leave_no_trace(
        lambda: trainer_of(killed).train(resume=True),
        tmp_path / "killed",
        bits_of,
        expected,
        kills=max(2, NUM_KILLS // 10),
        seconds=seconds,
        latest=0.7,
        seed="moments of sft",
    )
