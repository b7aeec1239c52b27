"""The demo's third act: what makes a reply a good one, learned by a reward model, then written by PPO.

Enters: the packaged configs. Leaves: four run folders (replies, reward model, judge, policy), and what was learned.
First the model learns to reply at all, from good and bad replies alike; then which are good. The judge is a second
reward model, of comparisons that the first never saw; neither it nor its prompts train the policy. It is tested on
comparisons of which the weights that it starts from have read one reply each, good and bad alike. The replies are
authored for the project, not collected from people. Left out: the other acts (`demo`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loopos.cli.answers import as_time, say, table
from loopos.cli.demonstration.demo_files import fresh_folder, packaged_config, packaged_file
from loopos.cli.outcome import note
from loopos.cli.train import TrainOptions, exit_code, train
from loopos.evaluation.run_folder import Run, read_run

REPLIES_CONFIG, REWARD_CONFIG, PPO_CONFIG = "replies.json", "reward_model.json", "ppo.json"
TRAINING, JUDGING = "replies_train.jsonl", "replies_judge.jsonl"
# Each is tested on rows of the other; the judge has fewer to learn from, and takes fewer a step.
TRAINED = (("reward_model", TRAINING, JUDGING, 8), ("judge", JUDGING, TRAINING, 4))
_MOST_TESTED = 60
_FOLDER = Path("outputs/demo/preferences")
_SHOWN = ("reward", "kl", "response_length", "end_share")
_REPLIES_SHOWN = 3


def preferences() -> int:
    """Trains a model that replies, reward model and judge, each tested on the other's comparisons, and the policy;
    shows what came of it.
    """
    began = time.monotonic()
    say("replies to customers, good and bad ones, written for LoopOS (none is collected from people)")
    with ExitStack() as stack:
        folder = stack.enter_context(fresh_folder(_FOLDER, run="reward_model"))
        replies = folder / "replies.jsonl"
        write_replies(replies, packaged_file(stack, TRAINING))
        changes: dict[str, object] = {"data.reasoning_examples": replies, "data.output_dir": folder / "replies"}
        code = _train(packaged_config(stack, REPLIES_CONFIG, changes))
        if code:
            return code
        start = {"data.pretrained_weights": folder / "replies" / "model"}
        for name, train_on, test_on, batch_size in TRAINED:
            changes = {
                "data.preference_data": packaged_file(stack, train_on),
                "data.output_dir": folder / name,
                "training.batch_size": batch_size,
            }
            code = _train(packaged_config(stack, REWARD_CONFIG, {**start, **changes}))
            if code:
                return code
            show_accuracy(folder / name, packaged_file(stack, test_on))
        changes = {"data.reward_model": folder / "reward_model", "evaluation.judge": folder / "judge"}
        code = _train(packaged_config(stack, PPO_CONFIG, {**start, **changes, "data.output_dir": folder / "ppo"}))
        if code:
            return code
    show_policy(read_run(folder / "ppo"))
    show_replies(folder / "ppo" / "samples.jsonl")
    say(f"wall time {as_time(time.monotonic() - began)}; results in {folder}, summary in {folder}/ppo/report.md")
    return 0


def write_replies(file: Path, comparisons: Path) -> None:
    """One reply to each prompt of a file of comparisons, the better and the worse one in turn, as prompt and
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
    """How often a reward model, opened from its folder, scores the better reply of a comparison higher, on
    comparisons that it was not trained on.
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


def show_policy(run: Run) -> None:
    """Reward and KL by iteration, and what reward model and judge say of answers to unseen prompts."""
    rollouts = [event["metrics"] for event in run.events if event["event"] == "rollout"]
    rows = [(each["iteration"] + 1, *(f"{each[name]:.2f}" for name in _SHOWN)) for each in rollouts]
    say(table(rows, head=("iteration", *_SHOWN)))
    first, last = run.first_metrics, run.last_metrics
    for name, scores in (("reward", "reward_win_rate"), ("judge", "win_rate")):
        say(
            f"unseen prompts, by the {name}: mean {first[name]:.2f} before, {last[name]:.2f} after; the trained policy "
            f"wins {last[scores]:.0%}"
        )


def show_replies(samples: Path) -> None:
    """The first unseen prompts, answered before and after."""
    told = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    steps = sorted({each["step"] for each in told})
    before, after = (_answers(told, step) for step in (steps[0], steps[-1]))
    for one, other in list(zip(before, after, strict=True))[:_REPLIES_SHOWN]:
        say(" ".join(one["prompt"].split()))
        say(table([(name, " ".join(each["response"].split())) for name, each in (("before", one), ("after", other))]))


def _answers(told: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    return [each for each in told if each["step"] == step]
