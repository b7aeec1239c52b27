"""How rewards are called: options, None, async, limits of time; weights that change; what an unjudged answer does."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

from loopos.config.diagnostics import UserError
from loopos.config.ppo import PpoConfig
from loopos.config.rewards import PpoRewardSection, check_reward
from loopos.config.rl import RolloutSection
from loopos.rl.algorithms import PPO, AdvantageInputs, Algorithm, clipped_loss
from loopos.rl.collector import ScoredResponse
from loopos.rl.experience import AdvantageSettings, experience_of
from loopos.rl.policy_check import PolicyCheck
from loopos.rl.reward_functions import Scores
from loopos.rl.reward_metrics import reward_metrics
from loopos.rl.rewards import Response, RewardRun, Rewards, reward_function


def response(text: str, *, prompt: int = 1, **row: object) -> Response:
    return Response("a b", [prompt], text, [2, 3], True, "train.jsonl:7", row)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A reward function of the name called_rewards:score, with settings of its section."""

    def build(function: object, **settings: Any) -> Any:
        module = ModuleType("called_rewards")
        module.score = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "called_rewards", module)
        return reward_function("called_rewards:score", **settings)

    return build


def longest(prompts: Sequence[str], responses: Sequence[str], *, most: int, scale: float = 1.0) -> list[float | None]:
    return [None if len(text) > most else scale * len(text) for text in responses]


def test_options_are_arguments_by_name(own: Callable[..., Any]) -> None:
    assert own(longest, options={"most": 2, "scale": 0.5})([response("ab"), response("abc")]) == [1.0, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "options.most: got nothing; expected a value; add \"most\" to its options"),
        ({"most": 1, "scael": 2.0}, 'options.scael: got an unknown option; expected an option of it: most, scale; did you mean "scale"'),
        ({"most": "1"}, "options.most: got '1'; expected a whole number"),
        ({"most": 1, "prompts": []}, "options.prompts: got an unknown option"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str, own: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=f"^reward function called_rewards:score: {message}"):
        own(longest, options=options)


def test_options_of_built_in_functions_are_checked_with_the_config() -> None:
    functions = [{"name": "length_window", "options": {"maximum": 0}}, {"name": "regex", "options": {"patern": "a"}},
                 {"name": "regex"}, {"name": "language"}]  # fmt: skip
    section = PpoRewardSection.model_validate({"functions": functions})
    found = {
        problem.fields[0]: (problem.actual, problem.expected, problem.hint) for problem in check_reward(section, None)
    }
    assert found["reward.functions.0.options.maximum"] == ("0", 'a whole number >= 1 or null ("length_window")', "")
    assert found["reward.functions.1.options.patern"][2] == 'did you mean "pattern"?'
    assert found["reward.functions.2.label"][:2] == ('a second "regex"', "a label of its own")
    assert found["reward.functions.3.options.scripts"][0] == "nothing"
    assert len(found) == 4


def test_a_class_is_made_with_its_options_and_gets_the_run(own: Callable[..., Any]) -> None:
    class Counted:
        def __init__(self, *, start: int = 0) -> None:
            self.number, self.run = start, None

        def open_run(self, run: RewardRun) -> None:
            self.run = run

        def __call__(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Any]) -> Scores:
            self.number += len(responses)
            return Scores([self.number + row["plus"] for row in rows], {"odd": [self.number % 2 == 1] * len(rows)})

    run = RewardRun(rank=3)
    function = own(Counted, options={"start": 4}, run=run)
    assert function.takes_rows
    assert function.function.function.run is run
    found = function.scores([response("a", plus=0.5)])
    assert (found.values, found.fractions) == ([5.5], {"odd": [True]})


def test_tokens_and_ends_are_passed_by_name(own: Callable[..., Any]) -> None:
    def of_tokens(prompts: Any, responses: Any, *, num_tokens: list[int], ended: list[bool]) -> list[float]:
        return [number + 10 * end for number, end in zip(num_tokens, ended, strict=True)]

    assert own(of_tokens)([response("a"), Response("a", [1], "b", (), False, token_count=7)]) == [12.0, 7.0]


async def slowly(prompts: Sequence[str], responses: Sequence[str], *, seconds: float = 0.0) -> list[float]:
    await asyncio.sleep(seconds)
    return [float(len(text)) for text in responses]


def test_an_async_function_is_awaited_also_within_a_running_loop(own: Callable[..., Any]) -> None:
    function = own(slowly)
    assert function([response("ab")]) == [2.0]

    async def notebook() -> list[float | None]:
        found: list[float | None] = function([response("abc")])
        return found

    assert asyncio.run(notebook()) == [3.0]


def sleeps(prompts: Sequence[str], responses: Sequence[str], *, seconds: float) -> list[float]:
    time.sleep(seconds)
    return [0.0 for _ in responses]


@pytest.mark.parametrize("function", [sleeps, slowly])
def test_a_call_over_its_limit_does_not_judge_or_ends_the_run(function: Any, own: Callable[..., Any]) -> None:
    limited = own(function, options={"seconds": 5.0}, timeout=0.05)
    found = limited.scores([response("a"), response("b")])
    assert (found.values, found.fractions) == ([None, None], {"timeout": [True, True]})
    with pytest.raises(
        UserError, match=r"ran for more than 0.05 s \(timeout\)\n    for 2 responses, the first to train"
    ):
        own(function, options={"seconds": 5.0}, timeout=0.05, on_timeout="error")([response("a"), response("b")])
    assert own(function, options={"seconds": 0.0}, timeout=5.0)([response("")]) == [0.0]


def test_exceptions_of_async_functions_and_in_threads_name_function_row_and_prompt(own: Callable[..., Any]) -> None:
    async def raises(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        raise TimeoutError("of its own")

    for timeout in (None, 5.0):
        with pytest.raises(UserError) as caught:
            own(raises, timeout=timeout)([response("a"), response("b")])
        assert "called_rewards:score: raised TimeoutError at" in str(caught.value)
        assert "of its own\n    for train.jsonl:7, the prompt 'a b'" in str(caught.value)


def judged_by(*functions: dict[str, Any], **settings: Any) -> PpoRewardSection:
    return PpoRewardSection.model_validate({"functions": list(functions), **settings})


def test_the_sum_leaves_out_what_did_not_judge() -> None:
    sides = {"options": {"scripts": ["latin"]}, "name": "language", "weight": 2.0}
    words = {"name": "repetition", "weight": 0.5, "options": {"n": 1}}
    rewards = Rewards(None, judged_by(sides, words), RolloutSection())
    found = rewards([response("ab ab"), response("1 1")])
    # Of letters: all latin; without letters: not judged. Words repeated: one of two.
    assert found["language"][0] == 1.0
    assert math.isnan(found["language"][1])
    assert found["total"] == [2.0 - 0.25, -0.25]
    alone = Rewards(None, judged_by(sides), RolloutSection(missing_end_penalty=1.0))([response("1 1")])
    assert math.isnan(alone["total"][0])


def test_a_weight_goes_linearly_from_the_first_iteration_to_the_last() -> None:
    section = judged_by({"name": "exact", "weight": 1.0, "weight_end": 0.0}, {"name": "numeric", "weight": 0.5})
    rewards = Rewards(None, section, RolloutSection(), RewardRun(iterations=5))
    assert [rewards.weights(iteration)["exact"] for iteration in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    # Validations are compared by one measure.
    assert rewards.weights(None) == {"exact": 0.0, "numeric": 0.5}
    found = rewards([response("4", answer=4)], iteration=1)
    assert found["total"] == [1.25]


def scored(score: float, prompt: int, **parts: float) -> ScoredResponse:
    return ScoredResponse(response("a", prompt=prompt), score, parts)


def test_metrics_by_hand() -> None:
    nan = math.nan
    answers = [
        scored(1.0, 1, a=1.0, b=nan, fraction_b_time=1.0), scored(3.0, 1, a=3.0, b=nan, fraction_b_time=0.0),
        scored(2.0, 2, a=2.0, b=5.0, fraction_b_time=0.0), scored(2.0, 2, a=2.0, b=7.0, fraction_b_time=0.0),
    ]  # fmt: skip
    assert reward_metrics(answers) == {
        "reward": 2.0, "reward_std": math.sqrt(0.5), "no_signal": 0.5,
        "score_a": 2.0, "score_a_std": math.sqrt(0.5), "no_signal_a": 0.5,
        "score_b": 6.0, "score_b_std": 1.0, "judged_b": 0.5, "no_signal_b": 0.5, "fraction_b_time": 0.25,
    }  # fmt: skip
    single = reward_metrics([scored(1.0, 1), scored(nan, 2)])
    assert single == {"reward": 1.0, "reward_std": 0.0, "judged": 0.5}
    with pytest.raises(UserError, match="no reward judged any of 1 answers"):
        reward_metrics([scored(nan, 1)])


class Row:
    """A response of two tokens with a score and log-probabilities, as `experience_of` reads it."""

    def __init__(self, score: float, *, value: float | None = None) -> None:
        self.response, self.score, self.staleness = response("a"), score, 0
        self.logprobs = self.engine_logprobs = torch.tensor([-1.0, -2.0])
        self.reference_logprobs = None
        self.values = None if value is None else torch.full((2,), value)


def group_baseline(inputs: AdvantageInputs) -> torch.Tensor:
    """Score less the mean of its group."""
    assert inputs.judged is not None
    means = torch.stack([inputs.scores[inputs.groups == group].mean() for group in inputs.groups])
    return (inputs.scores - means)[:, None].expand(inputs.mask.shape)


def test_an_unjudged_answer_has_no_advantage_and_moves_no_baseline() -> None:
    settings = AdvantageSettings(
        penalty=None, discount=1.0, gae_lambda=1.0, whiten_rewards=False, whiten_advantages=False,
        algorithm=Algorithm("mine", group_baseline, clipped_loss, has_critic=False), responses_per_prompt=3,
    )  # fmt: skip
    rows = [Row(1.0), Row(math.nan), Row(3.0), Row(math.nan), Row(math.nan), Row(math.nan)]
    found = experience_of([[1]] * 6, rows, old_logprobs="forward", kl_coefficient=0.0, settings=settings)
    assert found.advantages.view(6, 2)[:, 0].tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def test_with_a_critic_an_unjudged_answer_returns_its_values() -> None:
    settings = AdvantageSettings(
        penalty=None, discount=1.0, gae_lambda=1.0, whiten_rewards=False, whiten_advantages=True, algorithm=PPO
    )
    rows = [Row(1.0, value=0.5), Row(math.nan, value=0.25), Row(2.0, value=0.5)]
    found = experience_of([[1]] * 3, rows, old_logprobs="forward", kl_coefficient=0.0, settings=settings)
    assert found.returns is not None
    assert found.returns.view(3, 2).tolist() == [[1.0, 1.0], [0.25, 0.25], [2.0, 2.0]]
    alone = experience_of([[1]] * 2, [rows[0], rows[2]], old_logprobs="forward", kl_coefficient=0.0, settings=settings)
    # Whitened over the judged tokens only.
    assert found.advantages.view(3, 2)[[0, 2]].tolist() == alone.advantages.view(2, 2).tolist()
    assert found.advantages.view(3, 2)[1].tolist() == [0.0, 0.0]


def test_the_identity_of_a_run_leaves_out_what_changes_no_score() -> None:
    plain = judged_by({"name": "exact"})
    assert plain.identity == {
        "model_weight": 1.0, "score_clip": None, "ensemble_penalty": 0.0,
        "functions": [{"name": "exact", "weight": 1.0}],
    }  # fmt: skip
    endpoint = {"base_url": "http://localhost:1/v1", "model": "m", "concurrency": 3, "max_requests": 7}
    judge = judged_by({"name": "judge", "label": "j", "timeout": "5m", "weight_end": 0.0, "options": endpoint})
    expected = {"name": "judge", "weight": 1.0, "weight_end": 0.0, "options": {"model": "m"}}
    assert judge.identity["functions"] == [expected]


def test_a_policy_check_keeps_unjudged_answers_out_of_win_rates() -> None:
    class Collected:
        rewards = object()

        def __init__(self) -> None:
            self.scores = [1.0, math.nan, 2.0]

        def __call__(self, request: Any) -> list[Any]:
            return [Judged(score, index) for index, score in enumerate(self.scores)]

    class Judged(Row):
        def __init__(self, score: float, index: int) -> None:
            super().__init__(score)
            self.response, self.parts, self.entropies = response("a", prompt=index), {}, torch.zeros(2)

        def kl(self, estimator: str) -> None:
            return None

    from loopos.generation.settings import SamplingParams

    collector: Any = Collected()
    check = PolicyCheck(collector, [[1]] * 3, SamplingParams(), None, estimator="k1", kl_limit=None)
    _, records = check.measure(is_start=True)
    assert [record["reward"] for record in records] == [1.0, None, 2.0]
    assert check.state() == {"first": {"reward": [1.0, None, 2.0]}}
    check.load(check.state())
    collector.scores = [0.0, 5.0, 3.0]
    metrics, _ = check.measure(is_start=False)
    # Of two prompts that both were judged on, one is won.
    assert metrics["reward_win_rate"] == 0.5


def test_a_config_reads_the_section(tmp_path: Any) -> None:
    functions = [
        {"name": "numeric", "weight_end": 0.5, "timeout": "2m", "on_timeout": "error", "options": {"tolerance": 0.1}}
    ]
    section = PpoConfig.model_fields["reward"].annotation
    assert section is not None
    read = section.model_validate({"functions": functions}).functions[0]
    assert (read.timeout, read.options) == (120.0, {"tolerance": 0.1})
