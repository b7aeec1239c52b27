"""Online preference optimization: the policy's own answers, compared by a reward, within the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pico_runs import slow_but
from preference_runs import ASKED, comparisons, events_of, reward_config, write_rows
from preference_runs import preference_config as config
from worlds import run_world

import loopos
from loopos.cli.data_preview import show
from loopos.config.diagnostics import ConfigError, UserError
from loopos.config.preference import PreferenceConfig
from loopos.data.batches import Cursor
from loopos.data.preferences import Pair
from loopos.methods.preference import PreferenceTrainer
from loopos.methods.reward_model import RewardModelTrainer
from loopos.planning.dry_run import plan_of as plan_run
from loopos.rl.collector import ScoredResponse
from loopos.rl.preference_rounds import RoundBatches, compared, plan_of, round_metrics
from loopos.rl.rewards import Response
from loopos.training.progress import RunProgress

ONLINE = {"every": 2, "max_new_tokens": 6, "responses_per_prompt": 3}
LORA = {"trainable": "lora", "lora": {"rank": 4}}


def online_config(run: Path, weights: Path, method: str = "dpo", **sections: Any) -> PreferenceConfig:
    """A run of a few rounds on the prompts of comparisons, judged by the length of answers."""
    functions = [{"name": sections.pop("function", "preference_runs:length_of")}]
    training = {"batch_size": 4, "max_steps": 6, "learning_rate": 1e-3, "validate_every": "never", **LORA}
    made = config(
        run,
        weights,
        method,
        rows=sections.pop("rows", None),
        training={**training, **sections.pop("training", {})},
        **{name: sections.pop(name) for name in ("data", "preference") if name in sections},
    ).model_dump(mode="json")
    made |= {"online": ONLINE, "reward": {"functions": functions}, **sections}
    return PreferenceConfig.model_validate(made)


def trained(settings: PreferenceConfig) -> PreferenceTrainer:
    method = PreferenceTrainer(settings, progress=RunProgress(quiet=True))
    method.train()
    return method


def steps(run: Path) -> list[dict[str, Any]]:
    return events_of(run, "step")


def answer(prompt: int, ids: list[int], score: float) -> ScoredResponse:
    return ScoredResponse(Response("asked", [prompt], "said", ids, True), score, {})


def test_the_best_answer_is_compared_with_the_worst() -> None:
    answers = [
        [answer(1, [5], 0.5), answer(1, [6, 7], 2.0), answer(1, [8], -1.0), answer(1, [9], 2.0)],
        [answer(2, [5], 1.0), answer(2, [6], 1.0)],
        [answer(3, [5, 6], 1.0), answer(3, [5, 6], 0.0)],
        [answer(4, [], 3.0), answer(4, [5], 1.0), answer(4, [6], 0.0)],
    ]
    found = compared(answers)
    assert [(each.prompt, each.responses, each.pairs, each.index) for each in found] == [
        ([1], [[6, 7], [8]], (Pair(0, 1, margin=3.0),), 0),
        ([4], [[5], [6]], (Pair(0, 1, margin=1.0),), 3),
    ]
    metrics = round_metrics(answers, found)
    assert (metrics["pairs"], metrics["no_signal"]) == (2.0, 0.5)
    assert (metrics["reward_chosen"], metrics["reward_rejected"]) == (1.5, -0.5)
    assert (metrics["length_chosen"], metrics["length_rejected"]) == (1.5, 1.0)


def test_a_round_is_divided_evenly_and_ends_early_with_few_comparisons(tmp_path: Path, pico_folder: Path) -> None:
    plan = plan_of(online_config(tmp_path / "run", pico_folder), num_prompts=20, rank=0, world=1)
    # 4 epochs over 20 prompts, 2 steps of 4 comparisons a round.
    assert (plan.iterations, plan.minibatches, plan.batch_size) == (10, 2, 24)
    written = {0: compared([[answer(i, [5], 1.0), answer(i, [6], 0.0)] for i in range(5)])}
    written |= {1: written[0][:1], 2: written[0][:2]}
    seen: list[list[int]] = []

    class Rows:
        def __init__(self, rows: Sequence[Any]) -> None:
            self.lengths = [1] * len(rows)

        def __call__(self, rows: Sequence[int]) -> Any:
            seen.append(sorted(rows))
            return rows

    batches: Any = RoundBatches(plan, written.__getitem__, Rows)  # type: ignore[arg-type]
    cursor, path = Cursor(), []
    while cursor.epoch < 3:
        batches.step(cursor)
        path.append((cursor.epoch, cursor.step))
        cursor = batches.after(cursor, {})
    assert path == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert sorted(seen[0] + seen[1]) == [0, 1, 2, 3, 4]
    assert [len(rows) for rows in seen] == [3, 2, 1, 1, 1]


@pytest.mark.parametrize("method", slow_but(["simpo", "aot"], ["dpo", "simpo", "mpo", "aot"]))
def test_losses_of_the_family(method: str, tmp_path: Path, pico_folder: Path) -> None:
    trained(online_config(tmp_path / "run", pico_folder, method, training={"max_steps": 4}))
    run = steps(tmp_path / "run")
    rounds = events_of(tmp_path / "run", "rollout")
    assert [event["iteration"] for event in rounds] == [0, 1]
    assert len(run) == 4
    assert all(0 < event["pairs"] <= 8 for event in rounds)
    assert all(event["reward_chosen"] > event["reward_rejected"] for event in rounds)
    if method != "simpo":
        assert (run[0]["rewards_chosen"], run[0]["rewards_rejected"]) == (0, 0)
        assert run[1]["rewards_chosen"] != 0


def letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The fraction of the letters a to m in a response."""
    return [sum(each in "abcdefghijklm" for each in text) / max(1, len(text)) for text in responses]


def test_the_reward_rises_and_validation_stays_that_of_the_rows(tmp_path: Path, pico_folder: Path) -> None:
    training = {
        "max_steps": 20, "learning_rate": 1e-2, "validate_every": 10, "batch_size": 8, "num_epochs": 50,
        "trainable": "all", "lora": None,
    }  # fmt: skip
    settings = online_config(
        tmp_path / "run", pico_folder, training=training, preference={"reference": "copy"},
        function="test_online_preference:letters",
        online={"every": 1, "max_new_tokens": 4, "responses_per_prompt": 4},
    )  # fmt: skip
    trained(settings)
    rewards = [event["reward"] for event in events_of(tmp_path / "run", "rollout")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    first, *_, last = events_of(tmp_path / "run", "validation")
    assert first["ties"] == 1
    assert 0 <= last["accuracy"] <= 1
    assert (tmp_path / "run" / "report.md").is_file()


def test_a_held_copy_answers_for_full_training(tmp_path: Path, pico_folder: Path) -> None:
    """The reference is the start throughout: its rewards are those of the start's own log-probabilities."""
    training = {"trainable": "all", "lora": None, "max_steps": 5, "learning_rate": 3e-3}
    settings = online_config(tmp_path / "run", pico_folder, preference={"reference": "copy"}, training=training)
    method = trained(settings)
    before = PreferenceTrainer(
        settings.model_copy(update={"data": settings.data.model_copy(update={"output_dir": str(tmp_path / "other")})}),
        progress=RunProgress(quiet=True),
    )
    before.load_data()
    before.build_model()
    batch = method.rows(method.encoder.comparisons(method.data.train)[0])([0, 1, 2])
    expected = before.model(batch.ids, batch.layout, batch.positions, batch.targets).logprobs
    assert method.objective.reference(batch).tolist() == expected.tolist()
    own = method.model(batch.ids, batch.layout, batch.positions, batch.targets).logprobs
    assert own.tolist() != expected.tolist()


def test_a_reward_model_judges_and_prompts_have_their_own_file(
    tmp_path: Path, pico_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = tmp_path / "reward"
    RewardModelTrainer(
        reward_config(reward, pico_folder, training={"num_epochs": 1}), progress=RunProgress(quiet=True)
    ).train()
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ASKED])
    validation = write_rows(tmp_path / "validation.jsonl", comparisons(10))
    settings = online_config(
        tmp_path / "run", pico_folder, training={"max_steps": 3, "validate_every": 2}, reward={},
        data={
            "preference_data": None, "prompts": str(prompts), "validation_data": str(validation),
            "reward_model": str(reward),
        },
    )  # fmt: skip
    written = settings.model_dump(mode="json")
    run = loopos.train(written, quiet=True)
    assert len(events_of(Path(run.folder), "validation")) == 3
    rounds = events_of(tmp_path / "run", "rollout")
    assert all("score_model" in event for event in rounds)
    method = PreferenceTrainer(settings, progress=RunProgress(quiet=True))
    method.load_data()
    assert method.sources is not None
    assert len(method.sources.prompts) == len(ASKED)
    assert len(method.validation_rows) == 10
    show(settings, num_rows=2, trust_remote_code=False)
    shown = capsys.readouterr().out
    assert "answered by at most 6" in shown
    assert f"train: {len(ASKED)} rows read" in shown
    plan = plan_run(settings, trust_remote_code=False)
    assert (plan["rows"]["train"], plan["rows"]["validation"]) == (len(ASKED), 10)
    # 4 passes over 5 prompts, 2 steps of 4 comparisons a round.
    assert plan["steps"]["all"] == 3
    assert plan["memory"]["reward models"] > 4 * plan["model"]["parameters"] * 0.5
    assert plan["time"]["left_out"] == ["writing and scoring answers"]


def answer_of_the_row(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[float]:
    """Reads a column of the row that the prompt comes from."""
    return [float(row["margin"]) * len(text) for row, text in zip(rows, responses, strict=True)]


def test_rewards_read_the_columns_of_the_rows(tmp_path: Path, pico_folder: Path) -> None:
    rows = [{**row, "margin": 2.0} for row in comparisons(20)]
    trained(
        online_config(
            tmp_path / "run", pico_folder, rows=rows, training={"max_steps": 1},
            function="test_online_preference:answer_of_the_row",
        )
    )  # fmt: skip
    (event,) = events_of(tmp_path / "run", "rollout")
    assert event["reward"] > 0


def test_a_changed_reward_is_another_run(tmp_path: Path, pico_folder: Path) -> None:
    trained(online_config(tmp_path / "run", pico_folder, training={"max_steps": 2}))
    other = online_config(tmp_path / "run", pico_folder, function="preference_runs:early_letters")
    with pytest.raises(UserError, match=r"reward"):
        PreferenceTrainer(other, progress=RunProgress(quiet=True)).train(resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_two_processes_are_the_same_run(mode: str, tmp_path: Path, pico_folder: Path) -> None:
    for name, size in {"one": 8, "two": 4}.items():
        training = {"batch_size": size, "max_steps": 4, "optimizer": "sgd", "learning_rate": 0.05, "num_epochs": 9}
        settings = online_config(tmp_path / name, pico_folder, training=training, distributed={"mode": mode})
        if name == "one":
            trained(settings)
        else:
            run_world(2, [(settings, False)])
    for kind, number in {"step": 4, "rollout": 2}.items():
        one, two = (events_of(tmp_path / name, kind) for name in ("one", "two"))
        assert len(one) == len(two) == number
        for mine, theirs in zip(one, two, strict=True):
            assert theirs == pytest.approx(mine, abs=1e-5)


def the_same(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [1.0] * len(responses)


def test_a_reward_that_tells_nothing_apart_ends_the_run(tmp_path: Path, pico_folder: Path) -> None:
    with pytest.raises(
        UserError, match="round 1: in 10 attempts the 3 answers to each of 8 prompts have equal rewards"
    ):
        trained(online_config(tmp_path / "run", pico_folder, function="test_online_preference:the_same"))


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("kto", {}, "KTO learns from single answers"),
        ("dpo", {"training.trainable": "all"}, 'preference.reference: got "auto" with trainable all; expected "copy"'),
        ("dpo", {"preference.reference": "cached"}, 'preference.reference: got "cached" with online'),
        ("dpo", {"reward": {}}, "data.reward_model: got no reward"),
        ("dpo", {"online.responses_per_prompt": 1}, "online.responses_per_prompt: got 1"),
        ("dpo", {"online": None, "data.prompts": "prompts.jsonl"}, "data.prompts"),
        ("dpo", {"online": None, "data.reward_model": "reward"}, "data.reward_model: got with no online"),
        ("dpo", {"training.max_length": 6}, "online.max_new_tokens: got 6; expected fewer than max_length (6)"),
    ],
)
def test_mistakes_name_their_key(
    method: str, changes: dict[str, Any], message: str, tmp_path: Path, pico_folder: Path
) -> None:
    written = online_config(tmp_path / "run", pico_folder).model_dump(mode="json")
    written["computation"]["method"] = method
    for key, value in changes.items():
        *sections, name = key.split(".")
        target = written
        for section in sections:
            target = target[section]
        target[name] = value
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(ConfigError) as problem:
        loopos.read_config(tmp_path / "config.json")
    assert message in str(problem.value)
