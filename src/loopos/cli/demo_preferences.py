"""The demo's third act: what people might prefer in a reply, learned by a reward model, then written by PPO.

Enters: the packaged configs. Leaves: three run folders (reward model, judge, policy), and what was learned. The judge
is a second reward model, of comparisons that the first never saw; neither it nor its prompts train the policy. The
replies are authored for the project, not collected from people. Left out: the other acts (`demo`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loopos.cli.answers import as_time, say, table
from loopos.cli.demo_files import fresh_folder, packaged_config, packaged_file
from loopos.cli.outcome import note
from loopos.cli.train import TrainOptions, exit_code, train
from loopos.evaluation.run_folder import Run, read_run

REWARD_CONFIG, PPO_CONFIG = "reward_model.json", "ppo.json"
TRAINING, JUDGING = "replies_train.jsonl", "replies_judge.jsonl"
# Each is tested on the other's rows; the judge has fewer to learn from, and goes over them more often.
TRAINED = (("reward_model", TRAINING, JUDGING, 1), ("judge", JUDGING, TRAINING, 3))
_FOLDER = Path("outputs/demo/preferences")
_SHOWN = ("reward", "kl", "response_length", "end_share")
_REPLIES_SHOWN = 3


def preferences() -> int:
    """Trains reward model and judge, each tested on the other's comparisons, then the policy; shows what came of it."""
    began = time.monotonic()
    folder = fresh_folder(_FOLDER, run="reward_model")
    say("comparisons of replies to customers, written for LoopOS (none is collected from people)")
    with ExitStack() as stack:
        for name, train_on, test_on, epochs in TRAINED:
            changes = {
                "data.preference_data": packaged_file(stack, train_on),
                "data.validation_data": packaged_file(stack, test_on),
                "data.output_dir": folder / name,
                "training.num_epochs": epochs,
            }
            code = _train(packaged_config(stack, REWARD_CONFIG, changes))
            if code:
                return code
            show_accuracy(name, read_run(folder / name))
        models = {"data.reward_model": folder / "reward_model", "evaluation.judge": folder / "judge"}
        code = _train(packaged_config(stack, PPO_CONFIG, {**models, "data.output_dir": folder / "ppo"}))
        if code:
            return code
    show_policy(read_run(folder / "ppo"))
    show_replies(folder / "ppo" / "samples.jsonl")
    say(f"wall time {as_time(time.monotonic() - began)}; the runs are in {folder} ({folder}/ppo/report.md tells it)")
    return 0


def _train(config: Any) -> int:
    result = train(config, TrainOptions())
    note(f"{config.computation.method}: {as_time(result.seconds)}")
    return exit_code(result.stopped_by) if result.interrupted else 0


def show_accuracy(name: str, run: Run) -> None:
    """How often the better reply of a comparison never trained on has the higher score."""
    before, after = run.first_metrics["pair_accuracy"], run.last_metrics["pair_accuracy"]
    say(f"{name.replace('_', ' ')}: pair accuracy on comparisons not trained on {before:.1%} before, {after:.1%} after")


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
        say(f"{one['prompt'].strip()}")
        say(table([(name, " ".join(each["response"].split())) for name, each in (("before", one), ("after", other))]))


def _answers(told: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    return [each for each in told if each["step"] == step]
