"""The reward `judge` against a local server that speaks OpenAI's API: retries, budget, cache, malformed replies."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from preference_runs import events_of, ppo_config

from loopos.config.diagnostics import UserError
from loopos.config.rewards import PpoRewardSection
from loopos.config.rl import RolloutSection
from loopos.evaluation import chat_endpoint
from loopos.methods.ppo import PpoTrainer
from loopos.rl.rewards import Response, RewardRun, Rewards, reward_function
from loopos.training.progress import RunProgress


class Stub:
    """A server; `answers`: the prompt's last word → what to reply, a text or a status."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[int] = []
        self.say = lambda text: "Fine. Score: 5"
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append(body)
                stub.headers.append(dict(self.headers))
                status = stub.failures.pop() if stub.failures else 200
                found: dict[str, Any] = {"error": {"message": "busy"}}
                if status == 200:
                    text = stub.say(body["messages"][-1]["content"])
                    found = {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 10}}
                content = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def options(self, **settings: Any) -> dict[str, Any]:
        return {"base_url": self.url, "model": "judge", "prompt": "{prompt}|{response}|{answer}", **settings}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(chat_endpoint, "_FIRST_WAIT", 0.001)
    found = Stub()
    yield found
    found.server.shutdown()
    found.server.server_close()


def answers(*texts: str) -> list[Response]:
    return [Response("q", [1], text, [2], True, "prompts.jsonl:1", {"answer": 4}) for text in texts]


def section(stub: Stub, **settings: Any) -> PpoRewardSection:
    return PpoRewardSection.model_validate({"functions": [{"name": "judge", "options": stub.options(**settings)}]})


def test_grades_are_scaled_and_equal_questions_asked_once(stub: Stub) -> None:
    stub.say = lambda text: {"q|a|4": "Score: 3\nNo: **Score: 8**", "q|b|4": "score = 2.5"}[text]
    judge = reward_function("judge", options=stub.options(system="Be strict.", parameters={"seed": 3}))
    assert judge(answers("a", "b", "a")) == [0.8, 0.25, 0.8]
    assert len(stub.requests) == 2
    assert stub.requests[0] == {
        "model": "judge", "temperature": 0.0, "max_tokens": 512, "seed": 3,
        "messages": [{"role": "system", "content": "Be strict."}, {"role": "user", "content": stub.requests[0]["messages"][1]["content"]}],
    }  # fmt: skip
    assert "Authorization" not in stub.headers[0]


def test_the_standard_prompt_has_the_rubric(stub: Stub) -> None:
    options = {"base_url": stub.url, "model": "judge", "rubric": "Is it short?", "maximum": 5.0}
    assert reward_function("judge", options=options)(answers("a")) == [1.0]
    text = stub.requests[0]["messages"][0]["content"]
    assert "[Question]\nq\n\n[Answer]\na\n\n[Rubric]\nIs it short?" in text
    assert "from 0 to 5." in text


def test_a_reply_without_a_grade_in_its_range_is_not_judged(stub: Stub) -> None:
    stub.say = lambda text: {"q|a|4": "I refuse.", "q|b|4": "Score: 11", "q|c|4": "Score: 10"}[text]
    found = reward_function("judge", options=stub.options()).scores(answers("a", "b", "c"))
    assert found.values == [None, None, 1.0]
    assert found.fractions["malformed"] == [True, True, False]


def test_passing_faults_are_tried_again_others_end_the_run(stub: Stub) -> None:
    stub.failures = [503, 429]
    assert reward_function("judge", options=stub.options())(answers("a")) == [0.5]
    assert len(stub.requests) == 3
    stub.failures = [500] * 3
    with pytest.raises(UserError, match=r"reward function judge: .*answered 500 .*in 3 attempts; check base_url"):
        reward_function("judge", options=stub.options(retries=2))(answers("b", "b"))
    # The rows are not asked about one by one.
    assert len(stub.requests) == 6
    stub.failures = [401]
    with pytest.raises(UserError, match=r"answered 401 Unauthorized: .*busy"):
        reward_function("judge", options=stub.options())(answers("c"))


def test_a_failure_can_be_left_unjudged_and_stays_so(stub: Stub, tmp_path: Path) -> None:
    stub.failures = [500] * 2
    run = RewardRun(tmp_path)
    options = stub.options(retries=1, on_failure="unjudged")
    found = reward_function("judge", options=options, run=run).scores(answers("a"))
    assert (found.values, found.fractions["failed"]) == ([None], [True])
    # The reply would be there now; a resumed run is graded as it was.
    assert reward_function("judge", options=options, run=run)(answers("a")) == [None]
    assert len(stub.requests) == 2


def test_the_key_comes_only_from_an_environment_variable(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r'options.api_key: got an unknown option.*did you mean "api_key_env"'):
        reward_function("judge", options=stub.options(api_key="secret"))
    with pytest.raises(UserError, match="the environment variable MY_KEY is not set"):
        reward_function("judge", options=stub.options(api_key_env="MY_KEY"))
    monkeypatch.setenv("MY_KEY", "secret")
    reward_function("judge", options=stub.options(api_key_env="MY_KEY"))(answers("a"))
    assert stub.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(("option", "message"), [
    ({"prompt": "{prompt}"}, "it has no {response}"),
    ({"pattern": "score"}, "expected one with a group"),
    ({"minimum": 10.0}, r"minimum: got 10; expected less than maximum \(10\)"),
    ({"base_url": "localhost:8000"}, "expected a URL such as"),
])  # fmt: skip
def test_options_that_do_not_fit(option: dict[str, Any], message: str, stub: Stub) -> None:
    with pytest.raises(UserError, match=message):
        reward_function("judge", options=stub.options(**option))


def test_a_column_that_the_row_lacks_is_named(stub: Stub) -> None:
    with pytest.raises(UserError, match=r"names \{fact\}, but the row has no such column[\s\S]*for prompts.jsonl:1"):
        reward_function("judge", options=stub.options(prompt="{response}{fact}"))(answers("a"))


def test_behind_its_budget_the_run_stops_or_goes_on_unjudged(stub: Stub, tmp_path: Path) -> None:
    texts = answers("a", "b", "c", "d", "a")
    with pytest.raises(UserError, match=r"its budget is used up \(3 requests, 30 tokens\) with 1 responses to grade"):
        reward_function("judge", options=stub.options(max_requests=3))(texts)
    for budget in ({"max_requests": 3}, {"max_total_tokens": 25, "concurrency": 1}):
        judge = reward_function("judge", options=stub.options(at_budget="unjudged", **budget))
        found = judge.scores(texts)
        assert found.values == [0.5, 0.5, 0.5, None, 0.5]
        assert found.fractions["over_budget"] == [False, False, False, True, False]


def test_a_resumed_run_counts_and_grades_as_an_uninterrupted_one(stub: Stub, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_requests": 5, "at_budget": "unjudged", "concurrency": 2}

    def opened(name: str) -> Rewards:
        return Rewards(None, section(stub, **settings), RolloutSection(), RewardRun(tmp_path / name))

    rounds = [answers("a", "b", "c"), answers("b", "d", "e"), answers("f", "a", "g")]
    whole = opened("whole")
    expected = [whole(each, iteration=index) for index, each in enumerate(rounds)]
    assert len(stub.requests) == 5
    first = opened("resumed")
    first(rounds[0], iteration=0)
    saved = {"ranks": [json.loads(json.dumps(first.state()))]}
    # Killed within the second iteration, in the middle of a line.
    first(rounds[1], iteration=1)
    file = tmp_path / "resumed" / "rewards" / "judge.0.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    resumed, before = opened("resumed"), len(stub.requests)
    resumed.load(saved)
    assert repr([resumed(each, iteration=1 + index) for index, each in enumerate(rounds[1:])]) == repr(expected[1:])
    assert len(stub.requests) == before + 1
    assert file.read_text() == (tmp_path / "whole" / "rewards" / "judge.0.jsonl").read_text()


def test_a_policy_is_graded_while_it_trains_and_resumes_without_new_requests(
    stub: Stub, tmp_path: Path, pico_folder: Path
) -> None:
    stub.say = lambda text: f"Score: {len(text) % 11}"
    options = stub.options(prompt="{prompt}|{response}", max_requests=40)
    reward = {"functions": [{"name": "judge", "label": "grade", "options": options, "weight_end": 0.0, "weight": 1.0}]}
    config = ppo_config(tmp_path / "run", pico_folder, reward=reward, training={"max_iterations": 2})
    method = PpoTrainer(config, progress=RunProgress(quiet=True))
    method.train()
    rollouts = events_of(tmp_path / "run", "rollout")
    assert {"score_grade", "score_grade_std", "fraction_grade_malformed"} <= set(rollouts[0])
    # The weight is 1 in the first iteration and 0 in the last.
    assert rollouts[0]["reward"] == pytest.approx(rollouts[0]["score_grade"])
    assert rollouts[1]["reward"] == 0.0
    asked = len(stub.requests)
    assert (tmp_path / "run" / "rewards" / "grade.0.jsonl").read_text().count("\n") == asked
    again = PpoTrainer(config, progress=RunProgress(quiet=True))
    again.train(resume=True)
    assert len(stub.requests) == asked
    assert method.state.rewards is not None
    assert again.state.rewards is not None
    assert again.state.rewards.state() == method.state.rewards.state()
