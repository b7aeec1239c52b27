"""The demo's second act: one model trained twice on equally many tokens, with worked steps and with answers alone.

Enters: the packaged config. Leaves: two run folders, and what both answer to problems that neither has seen. The tasks
are those of Wei et al. 2022, drawn by `loopos.demo.symbolic`. Left out: the other acts (`demo`).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loopos.cli.answers import as_time, say, table
from loopos.cli.demonstration.demo_files import fresh_folder, packaged_config, packaged_file
from loopos.cli.outcome import note
from loopos.cli.train import TrainOptions, exit_code, train
from loopos.demo.symbolic import TASKS, SymbolicItem, Task, symbolic_items, write_items

CONFIG = "chain_of_thought.json"
# Additions take the most examples to learn, and a coin is guessed right every second time.
TRAINING_ITEMS: Mapping[Task, int] = {"last_letters": 60, "coin_flips": 40, "additions": 170}
TEST_ITEMS: Mapping[Task, int] = {"last_letters": 80, "coin_flips": 30, "additions": 90}
# Answers alone are short: so many times more problems make up for the tokens of the steps.
_MORE_PROBLEMS = 6
_CHAINS_SHOWN = 2


def chain_of_thought() -> int:
    """Trains both, then shows exact match by task, and two chains."""
    began = time.monotonic()
    with ExitStack() as stack:
        written = json.loads(packaged_file(stack, CONFIG).read_text(encoding="utf-8"))["data"]
        place = Path(written["reasoning_examples"]).parent
        folder = stack.enter_context(fresh_folder(place, run="with_chains"))
        tokens = write_data(folder, written)
        say(f"two trainings of {tokens['chains']:,} and {tokens['answers']:,} tokens: worked steps, answers alone")
        answered = {}
        for name in ("chains", "answers"):
            data = {"reasoning_examples": folder / f"{name}.jsonl", "output_dir": folder / f"with_{name}"}
            config = packaged_config(stack, CONFIG, {f"data.{key}": value for key, value in data.items()})
            result = train(config, TrainOptions())
            if result.interrupted:
                return exit_code(result.stopped_by)
            note(f"trained on {name} in {as_time(result.seconds)}; now {sum(TEST_ITEMS.values())} unseen problems")
            answered[name] = answers(config, folder / "test.jsonl")
    show(answered)
    say(f"wall time {as_time(time.monotonic() - began)}; data and runs are in {folder}")
    return 0


def write_data(folder: Path, data: Mapping[str, Any]) -> dict[str, int]:
    """Training problems with their steps, others with answers alone, of as many tokens, and test problems that are in
    neither. data: the section of the config that says how rows become tokens. Returns the tokens of both trainings.
    """
    write_items(folder / "test.jsonl", _mixed(TEST_ITEMS, "test", seed=3))
    chains = _mixed(TRAINING_ITEMS, "train", seed=1)
    write_items(folder / "chains.jsonl", chains)
    most = sum(_lengths(folder / "chains.jsonl", data))
    more = _mixed({task: _MORE_PROBLEMS * number for task, number in TRAINING_ITEMS.items()}, "train", seed=2)
    file = folder / "answers.jsonl"
    write_items(file, more, with_steps=False)
    kept, tokens = 0, 0
    for length in _lengths(file, data):
        if tokens + length > most:
            break
        kept, tokens = kept + 1, tokens + length
    assert kept < len(more), "too few problems to make up for the tokens of the steps"
    write_items(file, more[:kept], with_steps=False)
    return {"chains": most, "answers": tokens}


def _mixed(numbers: Mapping[Task, int], split: Any, *, seed: int) -> list[SymbolicItem]:
    items = [item for task in TASKS for item in symbolic_items(numbers[task], task, split=split, seed=seed)]
    random.Random(seed).shuffle(items)
    return items


def _lengths(file: Path, data: Mapping[str, Any]) -> list[int]:
    """Tokens of each row, as training makes them."""
    from loopos.config.chain_of_thought import ReasoningDataSection
    from loopos.data import rows
    from loopos.data.step_format import chosen_format
    from loopos.data.supervised_encoder import SupervisedEncoder
    from loopos.data.supervised_rows import read_supervised
    from loopos.models.sources import weights_source
    from loopos.models.tokenizers import open_tokenizer

    section = ReasoningDataSection.model_validate(data)
    step_format = chosen_format(section.step_format)
    tokenizer = open_tokenizer(weights_source(section.pretrained_weights))
    examples, _ = read_supervised(rows.read(str(file)), {}, step_format=step_format)
    encoded, _ = SupervisedEncoder(section, step_format, tokenizer, max_length=None)(examples)
    return [len(row.ids) for row in encoded]


def answers(config: Any, file: Path) -> list[dict[str, Any]]:
    """What a trained model, opened from its folder, says to the test problems, each with its task."""
    from loopos.data import rows
    from loopos.data.demonstrations import Demonstration
    from loopos.data.supervised_rows import read_supervised
    from loopos.evaluation.answer_check import AnswerCheck
    from loopos.evaluation.reasoning import Reasoner

    reasoner = Reasoner.open(config.data.output_dir)
    examples, _ = read_supervised(rows.read(str(file)), {}, step_format=reasoner.step_format)
    problems = [example for example in examples if isinstance(example, Demonstration)]
    check = AnswerCheck(reasoner, config.generation, config.evaluation, seed=config.training.seed)
    _, records = check.measure(problems)
    return [{**told, "task": item.row.values["task"]} for told, item in zip(records, problems, strict=True)]


def show(answered: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Exact match of both by task, and chains of right answers."""
    rows: list[tuple[str, ...]] = [("exact match on unseen problems", "answers alone", "with steps")]
    for task in (*TASKS, "all"):
        shares = []
        for name in ("answers", "chains"):
            right = [told["is_right"] for told in answered[name] if task in ("all", told["task"])]
            shares.append(f"{sum(right)}/{len(right)} = {sum(right) / len(right):.0%}")
        rows.append((task.replace("_", " "), *shares))
    say(table(rows))
    seen: set[str] = set()
    for told in answered["chains"]:
        if told["is_right"] and told["task"] not in seen and len(seen) < _CHAINS_SHOWN:
            seen.add(told["task"])
            say(f"{told['problem']}\n    " + told["text"].strip().replace("\n", "\n    "))
