"""`loopos demo`: trains a real model on packaged data, one act per method; run folders are in outputs/demo/.

1. A classifier of customer messages.
2. Chain of thought: one model trained twice on equally many tokens, with worked steps and with only answers. The tasks
   are those of Wei et al. 2022, drawn by `loopos.demo.symbolic`.
3. Preferences: the model learns to reply, a reward model learns which replies are good, and PPO writes such replies;
   DPO learns from the same comparisons without a reward model, with about as many tokens. A second reward model,
   trained on other comparisons, judges both. The replies were written for the project.

Each act reads its config from the package (`loopos/demo/*.json`, the same as `configs/demo/*.json`).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopos.cli.answers import confusion_table, say, table
from loopos.cli.options import Verbose
from loopos.cli.outcome import note
from loopos.cli.process import hush_libraries, restart_with_settings
from loopos.cli.train import TrainOptions, exit_code, train
from loopos.config.figures import as_bytes, as_time
from loopos.demo.symbolic import TASKS, SymbolicItem, Task, symbolic_items, write_items
from loopos.storage.folder_lock import FolderBusy, only_writer

if TYPE_CHECKING:
    from loopos.evaluation.run_folder import RunFolder
    from loopos.evaluation.winrate import Reply

_PACKAGE = "loopos.demo"


def packaged_file(stack: ExitStack, name: str) -> Path:
    """The path of a packaged file while `stack` is open."""
    return stack.enter_context(as_file(files(_PACKAGE) / name))


def packaged_lines(name: str) -> list[str]:
    return (files(_PACKAGE) / name).read_text(encoding="utf-8").splitlines()


def packaged_config(stack: ExitStack, name: str, changes: Mapping[str, object] | None = None) -> Any:
    """A packaged config with values changed by key; packaged files in its `data` section get their real paths.
    Raises `ConfigError`.
    """
    from loopos.config.load import load
    from loopos.config.methods import config_classes

    path = packaged_file(stack, name)
    actual = {key: value if isinstance(value, int | float) else str(value) for key, value in (changes or {}).items()}
    for key, value in json.loads(path.read_text(encoding="utf-8"))["data"].items():
        if isinstance(value, str) and value.startswith("src/loopos/demo/"):
            actual.setdefault(f"data.{key}", str(packaged_file(stack, Path(value).name)))
    return load(path, [f"{key}={json.dumps(value)}" for key, value in actual.items()], config_classes()).config


@contextmanager
def fresh_folder(folder: Path, *, run: str = ".") -> Iterator[Path]:
    """`folder`, or `folder-2`, `folder-3` … : the first without a run in its subfolder `run` and without another demo.
    No run is overwritten. The folder stays locked until the block ends.
    """
    from loopos.evaluation.run_folder import holds_run

    for number in count(1):
        fresh = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with ExitStack() as lock:
            try:
                lock.enter_context(only_writer(fresh))
            except FolderBusy:
                continue
            if not holds_run(fresh / run):
                yield fresh
                return


FINE_TUNING_CONFIG, LIVE = "fine_tuning.json", "intents_live.txt"
_FINE_TUNING_FOLDER = Path("outputs/demo/fine_tuning")


def fine_tuning() -> int:
    """Trains, then shows accuracy before and after, the confusion table, and predictions for unseen messages."""
    began = time.monotonic()
    with ExitStack() as stack:
        folder = stack.enter_context(fresh_folder(_FINE_TUNING_FOLDER))
        result = train(packaged_config(stack, FINE_TUNING_CONFIG, {"data.output_dir": folder}), TrainOptions())
    if result.interrupted:
        return exit_code(result.stopped_by)
    from loopos.evaluation.run_folder import read_run

    show_predictions(read_run(folder))
    predict_live(folder, packaged_lines(LIVE))
    say(f"wall time {as_time(time.monotonic() - began)}; results in {folder}, summary in {folder}/report.md")
    return 0


def show_predictions(run: RunFolder) -> None:
    """Accuracy before and after, and the confusion table."""
    before, after = run.first_metrics["accuracy"], run.last_metrics["accuracy"]
    say(f"accuracy on validation messages: {before:.1%} before, {after:.1%} after {run.step} steps")
    if run.confusion is not None:
        say(confusion_table(*run.confusion))


def predict_live(folder: Path, messages: Sequence[str]) -> None:
    """Predictions of the trained model, opened from its folder, for unseen messages."""
    from loopos.evaluation.predictor import Predictor

    answers = Predictor.open(folder).predict(list(messages))
    say("live predictions")
    rows = [
        (answer["label"], f"{max(answer['probabilities'].values()):.0%}", message)
        for answer, message in zip(answers, messages, strict=True)
    ]
    say(table(rows))


REASONING_CONFIG = "chain_of_thought.json"
# Additions need the most examples; a coin flip is guessed right half of the time.
TRAINING_ITEMS: Mapping[Task, int] = {"last_letters": 60, "coin_flips": 40, "additions": 170}
TEST_ITEMS: Mapping[Task, int] = {"last_letters": 80, "coin_flips": 30, "additions": 90}
# Answers without steps are short: this many times more problems have as many tokens.
_MORE_PROBLEMS = 6
_CHAINS_SHOWN = 2


def chain_of_thought() -> int:
    """Trains both, then shows exact match by task, and two chains."""
    began = time.monotonic()
    with ExitStack() as stack:
        written = json.loads(packaged_file(stack, REASONING_CONFIG).read_text(encoding="utf-8"))["data"]
        path = Path(written["reasoning_examples"]).parent
        folder = stack.enter_context(fresh_folder(path, run="with_chains"))
        tokens = write_data(folder, written)
        say(f"two trainings of {tokens['chains']:,} and {tokens['answers']:,} tokens: worked steps, only answers")
        answered = {}
        for name in ("chains", "answers"):
            data = {"reasoning_examples": folder / f"{name}.jsonl", "output_dir": folder / f"with_{name}"}
            config = packaged_config(stack, REASONING_CONFIG, {f"data.{key}": value for key, value in data.items()})
            result = train(config, TrainOptions())
            if result.interrupted:
                return exit_code(result.stopped_by)
            note(f"trained on {name} in {as_time(result.seconds)}; now {sum(TEST_ITEMS.values())} unseen problems")
            answered[name] = answers(config, folder / "test.jsonl")
    show_answers(answered)
    say(f"wall time {as_time(time.monotonic() - began)}; data and runs are in {folder}")
    return 0


def write_data(folder: Path, data: Mapping[str, Any]) -> dict[str, int]:
    """Writes training problems with steps, others with only answers and as many tokens, and separate test problems.
    data: the section of the config that sets how rows become tokens. Returns the tokens of both trainings.
    """
    write_items(folder / "test.jsonl", _mixed(TEST_ITEMS, "test", seed=3))
    chains = _mixed(TRAINING_ITEMS, "train", seed=1)
    write_items(folder / "chains.jsonl", chains)
    most = sum(_lengths(folder / "chains.jsonl", data))
    more = _mixed({task: _MORE_PROBLEMS * number for task, number in TRAINING_ITEMS.items()}, "train", seed=2)
    file = folder / "answers.jsonl"
    write_items(file, more, with_steps=False)
    num_used, tokens = 0, 0
    for length in _lengths(file, data):
        if tokens + length > most:
            break
        num_used, tokens = num_used + 1, tokens + length
    assert num_used < len(more), "too few problems to make up for the tokens of the steps"
    write_items(file, more[:num_used], with_steps=False)
    return {"chains": most, "answers": tokens}


def _mixed(numbers: Mapping[Task, int], split: Any, *, seed: int) -> list[SymbolicItem]:
    items = [item for task in TASKS for item in symbolic_items(numbers[task], task, split=split, seed=seed)]
    random.Random(seed).shuffle(items)
    return items


def _lengths(file: Path, data: Mapping[str, Any]) -> list[int]:
    """Tokens of each row, as training encodes it."""
    from loopos.config.chain_of_thought import ReasoningDataSection
    from loopos.data import rows
    from loopos.data.step_format import chosen_format
    from loopos.data.supervised_rows import read_supervised
    from loopos.data.supervised_tokens import SupervisedEncoder
    from loopos.models.tokenizers import open_tokenizer

    section = ReasoningDataSection.model_validate(data)
    step_format = chosen_format(section.step_format)
    tokenizer = open_tokenizer(section.pretrained_weights)
    examples, _ = read_supervised(rows.read(str(file)), {}, step_format=step_format)
    encoded, _ = SupervisedEncoder(section, step_format, tokenizer, max_length=None)(examples)
    return [len(row.ids) for row in encoded]


def answers(config: Any, file: Path) -> list[dict[str, Any]]:
    """Answers of a trained model, opened from its folder, to the test problems, each with its task."""
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
    return [{**answer, "task": item.row.values["task"]} for answer, item in zip(records, problems, strict=True)]


def show_answers(answered: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Exact match of both models by task, and chains of right answers."""
    rows: list[tuple[str, ...]] = [("exact match on unseen problems", "only answers", "with steps")]
    for task in (*TASKS, "all"):
        scores = []
        for name in ("answers", "chains"):
            right = [answer["is_right"] for answer in answered[name] if task in ("all", answer["task"])]
            scores.append(f"{sum(right)}/{len(right)} = {sum(right) / len(right):.0%}")
        rows.append((task.replace("_", " "), *scores))
    say(table(rows))
    seen: set[str] = set()
    for answer in answered["chains"]:
        if answer["is_right"] and answer["task"] not in seen and len(seen) < _CHAINS_SHOWN:
            seen.add(answer["task"])
            say(f"{answer['problem']}\n    " + answer["text"].strip().replace("\n", "\n    "))


REPLIES_CONFIG, REWARD_CONFIG = "replies.json", "reward_model.json"
POLICY_CONFIGS = {"ppo": "ppo.json", "dpo": "dpo.json"}
TRAINING, JUDGING, PROMPTS = "replies_train.jsonl", "replies_judge.jsonl", "reply_prompts.jsonl"
# Each is tested on rows of the other; the judge has less data and uses smaller batches.
TRAINED = (("reward_model", TRAINING, JUDGING, 8), ("judge", JUDGING, TRAINING, 4))
_MOST_TESTED = 60
_PREFERENCES_FOLDER = Path("outputs/demo/preferences")
_SHOWN = ("reward", "kl", "response_length", "eos_rate")
_REPLIES_SHOWN = 3
_SAMPLING: Mapping[str, Any] = {"temperature": 0.7, "max_new_tokens": 32, "seed": 0}


def preferences() -> int:
    """Trains a model that replies, a reward model and a judge, each tested on the other's comparisons, and two policies
    from that model; shows how often their replies are better than its own.
    """
    began = time.monotonic()
    say("replies to customers, good and bad, written for LoopOS (none is collected from people)")
    with ExitStack() as stack:
        folder = stack.enter_context(fresh_folder(_PREFERENCES_FOLDER, run="reward_model"))
        code = _train_rewards(stack, folder)
        if code:
            return code
        for name, config in POLICY_CONFIGS.items():
            changes: dict[str, object] = {
                "data.pretrained_weights": folder / "replies" / "model",
                "data.output_dir": folder / name,
            }
            if name == "ppo":
                changes["data.reward_model"] = folder / "reward_model"
            code = _train(packaged_config(stack, config, changes))
            if code:
                return code
    from loopos.evaluation.run_folder import read_run

    runs = {name: read_run(folder / name) for name in POLICY_CONFIGS}
    show_iterations(runs["ppo"])
    prompts = [json.loads(line)["prompt"] for line in packaged_lines(PROMPTS)]
    replies = {name: replies_of(folder / name, prompts) for name in ("replies", *runs)}
    show_win_rates(folder, replies, {name: trained_tokens(run) for name, run in runs.items()})
    show_replies(prompts, replies)
    say(f"wall time {as_time(time.monotonic() - began)}; results in {folder}, a summary in report.md of each run")
    return 0


def _train_rewards(stack: ExitStack, folder: Path) -> int:
    """Trains the model that replies, and from it the reward model and the judge."""
    replies = folder / "replies.jsonl"
    write_replies(replies, packaged_file(stack, TRAINING))
    changes: dict[str, object] = {"data.reasoning_examples": replies, "data.output_dir": folder / "replies"}
    code = _train(packaged_config(stack, REPLIES_CONFIG, changes))
    if code:
        return code
    for name, train_on, test_on, batch_size in TRAINED:
        changes = {
            "data.pretrained_weights": folder / "replies" / "model",
            "data.preference_data": packaged_file(stack, train_on),
            "data.output_dir": folder / name,
            "training.batch_size": batch_size,
        }
        code = _train(packaged_config(stack, REWARD_CONFIG, changes))
        if code:
            return code
        show_accuracy(folder / name, packaged_file(stack, test_on))
    return 0


def write_replies(file: Path, comparisons: Path) -> None:
    """Writes one reply per prompt of a file of comparisons, alternately the better and the worse one, as prompt and
    completion.
    """
    rows = [json.loads(line) for line in comparisons.read_text(encoding="utf-8").splitlines()]
    sides = ("chosen", "rejected")
    lines = [
        json.dumps({"prompt": row["prompt"], "completion": row[sides[number % 2]]}) + "\n"
        for number, row in enumerate(rows)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")


def _train(config: Any) -> int:
    result = train(config, TrainOptions())
    note(f"{config.computation.method}: {as_time(result.seconds)}")
    return exit_code(result.stopped_by) if result.interrupted else 0


def show_accuracy(run: Path, file: Path) -> None:
    """How often a reward model, opened from its folder, scores the better reply higher, on comparisons that it was not
    trained on.
    """
    from loopos.data import rows
    from loopos.data.preferences import read_comparisons
    from loopos.evaluation.reward_predictor import RewardPredictor

    examples, _ = read_comparisons(rows.read(str(file)), {})
    metrics = RewardPredictor.open(str(run)).score(examples[:_MOST_TESTED]).metrics
    low, high = metrics["pair_accuracy_low"], metrics["pair_accuracy_high"]
    say(
        f"{run.name.replace('_', ' ')}: pair accuracy {metrics['pair_accuracy']:.1%} (95% interval {low:.1%} to "
        f"{high:.1%}) on {metrics['num_pairs']:.0f} comparisons that it was not trained on"
    )


def show_iterations(run: RunFolder) -> None:
    """Reward and KL of PPO by iteration."""
    rollouts = [event["metrics"] for event in run.events if event["event"] == "rollout"]
    rows = [(each["iteration"] + 1, *(f"{each[name]:.2f}" for name in _SHOWN)) for each in rollouts]
    say(table(rows, head=("PPO iteration", *_SHOWN)))


def trained_tokens(run: RunFolder) -> int:
    """Tokens that went through the training passes of a run."""
    tokens: int = [event["metrics"]["tokens"] for event in run.events if event["event"] == "step"][-1]
    return tokens


def replies_of(run: Path, prompts: Sequence[str]) -> list[Reply]:
    """A reply of the run's model to every prompt, with the same seed for every model."""
    from loopos.cli.opened_models import open_reasoner
    from loopos.evaluation.winrate import Reply
    from loopos.generation.settings import SamplingParams

    reasoner = open_reasoner(str(run), device="auto", precision="auto")
    settings = reasoner.sampling(SamplingParams(**_SAMPLING))
    found: list[Reply] = []
    for each in reasoner.engine.generate([reasoner.prompt(prompt) for prompt in prompts], settings, logprobs=False):
        ended = each.finish_reason in ("stop", "stop string")
        found.append(Reply(each.text, len(each.token_ids), ended))
    return found


def show_win_rates(folder: Path, replies: Mapping[str, Sequence[Reply]], tokens: Mapping[str, int]) -> None:
    """How often the judge prefers a policy's reply to that of the model that it started from. tokens: of each policy's
    training.
    """
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.evaluation.winrate import Contest, Pair, by_reward, rate_of

    judge = by_reward(RewardPredictor.open(str(folder / "judge")))
    prompts = [json.loads(line)["prompt"] for line in packaged_lines(PROMPTS)]
    rows: list[tuple[Any, ...]] = []
    for name, trained in tokens.items():
        answered = list(zip(prompts, replies[name], replies["replies"], strict=True))
        rulings = judge([Contest(prompt, one.text, other.text) for prompt, one, other in answered])
        pairs = [
            Pair(number, 0, Contest(prompt, one.text, other.text), one, other, ruling)
            for number, ((prompt, one, other), ruling) in enumerate(zip(answered, rulings, strict=True))
            if ruling is not None
        ]
        rate = rate_of(pairs)
        lengths = [reply.tokens for reply in replies[name]]
        shown = f"{rate.rate:.0%} ({rate.low:.0%} to {rate.high:.0%})"
        rows.append((name.upper(), f"{trained:,}", shown, f"{sum(lengths) / len(lengths):.1f}"))
    say(f"{len(prompts)} unseen prompts, by the judge: how often a reply is better than before this training")
    say(table(rows, head=("", "trained tokens", "win rate (95%)", "tokens a reply")))


def show_replies(prompts: Sequence[str], replies: Mapping[str, Sequence[Reply]]) -> None:
    """Replies to the first unseen prompts, before and after."""
    names = {"before": "replies", **{name.upper(): name for name in POLICY_CONFIGS}}
    for number, prompt in enumerate(prompts[:_REPLIES_SHOWN]):
        say(prompt)
        say(table([(shown, " ".join(replies[name][number].text.split())) for shown, name in names.items()]))


@dataclass(frozen=True, slots=True)
class Act:
    """One part of the demo: its title, and what it runs; `perform` returns 0 on success."""

    title: str
    perform: Callable[[], int]


ACTS = (
    Act("fine-tuning: ten intents of customer messages", fine_tuning),
    Act("chain of thought: last letters, coin flips, additions", chain_of_thought),
    Act("preferences: a reward model and PPO, and DPO beside it", preferences),
)


def run(verbose: Verbose = False) -> int:
    """Performs the acts in order; stops at the first that fails or is interrupted. Raises `UserError`."""
    from loopos.models.gguf import cache_folder
    from loopos.models.resolve import EMBEDDED_PACKAGE, embedded_model

    hush_libraries(verbose=verbose)
    weights = embedded_model()
    restart_with_settings()
    note(
        f"nothing is downloaded: the weights ({as_bytes(weights.stat().st_size)}) are in the installed package "
        f"{EMBEDDED_PACKAGE}, the data in this one"
    )
    if not any((cache_folder() / "gguf").glob("*/config.json")):
        note("converting the embedded model once: about half a minute")
    for number, act in enumerate(ACTS, start=1):
        say(f"act {number} of {len(ACTS)}: {act.title}")
        code = act.perform()
        if code:
            return code
    return 0
