"""The command line around reward_model, ppo and rlhf: dry runs, previews, scores, and models used for the wrong thing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from pico_runs import slow_but

from loopos.cli.data_preview import preferences_of, response_fates
from loopos.cli.opened_models import use_of
from loopos.config.methods import BUILTIN
from loopos.config.ppo import PpoConfig
from loopos.data.preference_tokens import EncodedComparison
from loopos.data.preferences import Pair
from loopos.methods.ppo import PpoTrainer
from loopos.planning import dry_run
from loopos.planning.estimate import MATMUL_EFFICIENCY, generation_seconds
from loopos.training.progress import RunProgress
from tests.cli.conftest import Invoke, write_jsonl
from tests.cli.test_estimate import SMALL

COMPARISONS = [
    {"prompt": f"where is my parcel {i}", "chosen": "thank you, it comes", "rejected": "just wait"} for i in range(12)
]
PROMPTS = [{"prompt": f"my card was charged {i}"} for i in range(7)]
TRAINING = {"learning_rate": 0.001, "batch_size": 4, "num_epochs": 1, "precision": "fp32", "device": "cpu"}
POLICY = {**TRAINING, "inner_epochs": 2, "minibatches": 2, "validate_every": "never", "max_iterations": 2}
# Two layers of d 32, 4 heads, 2 key heads, d_ff 64, and a norm; the 400 embeddings; the output embedding.
BACKBONE, OUTPUT = 2 * (3072 + 6144 + 64) + 400 * 32 + 32, 400 * 32
Write = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def _no_reports() -> Iterator[None]:
    """Drawing takes longer than a pico run."""
    with patch("loopos.methods.base.write_report"):
        yield


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "measured_rates", lambda device, half: (1e9, 1e9))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    write_jsonl(folder / "comparisons.jsonl", COMPARISONS)
    write_jsonl(folder / "prompts.jsonl", PROMPTS)
    return folder


@pytest.fixture(scope="module")
def config(home: Path, pico_folder: Path) -> Write:
    """`config("ppo", run="first", training={…}, data={…})`: a file with a small config of the method."""

    def write(method: str, *, run: str, **sections: dict[str, Any]) -> Path:
        rows = {"prompts": str(home / "prompts.jsonl")} if method != "reward_model" else {}
        if method != "ppo":
            rows["preference_data"] = str(home / "comparisons.jsonl")
        data = {"pretrained_weights": str(pico_folder), "output_dir": str(home / run), "validation_share": 0.25, **rows}
        small = TRAINING if method == "reward_model" else POLICY
        content = {
            "computation": {"mode": "posttraining", "method": method},
            **sections,
            "training": {**small, **sections.get("training", {})},
            "data": {**data, **sections.get("data", {})},
        }
        if method != "reward_model":
            content["generation"] = {"max_new_tokens": 5}
        file = home / f"{run}.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="module")
def rewards(home: Path, config: Write, invoke: Invoke) -> dict[str, Any]:
    """Reward models trained whole and as an adapter: the run's folder, and what `loopos train` printed."""
    found = {}
    for trainable in ("all", "lora"):
        file = config("reward_model", run=f"reward-{trainable}", training={"trainable": trainable})
        found[trainable] = invoke("train", file, "--quiet")
        assert found[trainable].exit_code == 0, found[trainable].stderr
    return found


@pytest.fixture(scope="module")
def reward_run(rewards: dict[str, Any], home: Path) -> Path:
    assert len(rewards) == 2
    return home / "reward-all"


@pytest.fixture(scope="module")
def aligned(config: Write, invoke: Invoke) -> Any:
    """What `loopos train` prints of a whole run of rlhf, whose folder is aligned/."""
    result = invoke("train", config("rlhf", run="aligned", training={"max_iterations": 1}), "--quiet")
    assert result.exit_code == 0, result.stderr
    return result


@pytest.mark.parametrize(
    ("guards", "exit_code", "stopped_by", "ended"),
    [
        ({"kl": 1e-12, "stop": True}, 4, "guard", "stopped by a guard: KL "),
        ({"kl": 1e-12}, 0, "max_iterations", "stopped at max_iterations 2"),
    ],
)
def test_the_end_of_a_policy_is_named_and_a_monitor_has_its_own_exit_code(
    guards: dict[str, Any],
    exit_code: int,
    stopped_by: str,
    ended: str,
    reward_run: Path,
    home: Path,
    config: Write,
    invoke: Invoke,
) -> None:
    run = f"guarded-{stopped_by}"
    # k3 of two policies that differ is above 0.
    training = {"kl_report": "k3", "learning_rate": 0.01, "num_epochs": 9}
    file = config("ppo", run=run, guards=guards, training=training, data={"reward_model": str(reward_run)})
    result = invoke("train", file, "--quiet", "--json")
    assert result.exit_code == exit_code
    found = json.loads(result.stdout)
    assert found["stopped_by"] == stopped_by
    assert found["ended"].startswith(ended)
    # A guard's run is over: its weights are there.
    assert (home / run / "model" / "model.safetensors").is_file()
    assert "alert: KL " in result.stderr


@pytest.mark.usefixtures("known_rates")
def test_a_dry_run_of_a_reward_model_counts_what_the_run_then_does(
    rewards: dict[str, Any], home: Path, config: Write, invoke: Invoke
) -> None:
    file = config("reward_model", run="dry", reward={"heads": 3})
    plan = json.loads(invoke("train", file, "--dry-run", "--json").stdout)
    assert plan["model"]["parameters"] == plan["model"]["trained"] == BACKBONE + 3 * 32
    assert plan["rows"] == {"train": 9, "validation": 3, "responses": 18, "pairs": 9}
    assert plan["steps"] == {"epoch": 3, "all": 3}
    assert plan["memory"]["optimizer"] == 8 * plan["model"]["trained"]
    assert not (home / "dry").exists()
    events = (home / "reward-all" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    session, steps = json.loads(events[0])["metrics"], [json.loads(line) for line in events if '"step"' in line]
    assert session["total_steps"] == plan["steps"]["all"]
    assert session["shared prompts"] is True
    # A prompt counts once for its two responses, as in the batches.
    assert session["tokens"]["training"]["tokens"] == plan["tokens"]["epoch"] == plan["tokens"]["all"]
    assert sum(step["event"] == "step" for step in steps) == plan["steps"]["all"]


TRAINED = [("all", "all"), ("lora", "all"), ("lora", "lora"), ("lora", "lora all"), ("all", "all lora")]


@pytest.mark.usefixtures("known_rates")
@pytest.mark.parametrize(
    ("trainable", "reward", "value_model"),
    slow_but(
        [("all", "all", "policy"), ("lora", "all", "shared"), ("lora", "lora all", "reward")],
        [(*models, value_model) for models in TRAINED for value_model in ("reward", "policy", "shared")],
    ),
)
def test_the_roles_of_a_dry_run_are_those_that_training_builds(
    trainable: str, reward: str, value_model: str, rewards: dict[str, Any], home: Path, config: Write, invoke: Invoke
) -> None:
    file = config(
        "ppo",
        run="roles",
        training={"trainable": trainable, "value_model": value_model, "lora": {"rank": 4}}
        if trainable == "lora"
        else {"value_model": value_model},
        data={"reward_model": [str(home / f"reward-{name}") for name in reward.split()]},
    )
    plan = json.loads(invoke("train", file, "--dry-run", "--json").stdout)
    method = PpoTrainer(PpoConfig.model_validate_json(file.read_text("utf-8")), progress=RunProgress(quiet=True))
    method.device = torch.device("cpu")
    method.load_data()
    roles = method.build_model()
    every = {id(p): p.numel() for module in (roles.actor_critic, *roles.frozen) for p in module.parameters()}
    assert plan["model"]["parameters"] == sum(every.values())
    assert plan["model"]["trained"] == sum(p.numel() for p in method.trained.master_weights.parameters.values())
    found = re.search(r"(\d+|one) cop", roles.summary)
    assert found is not None
    assert plan["model"]["copies"] == (1 if found.group(1) == "one" else int(found.group(1)))
    assert sum(role["trained"] for role in plan["model"]["roles"].values()) == plan["model"]["trained"]
    scorers = ["reward model 1", "reward model 2"] if " " in reward else ["reward model"]
    assert list(plan["model"]["roles"]) == ["policy", "reference", *scorers, "value model"]


@pytest.mark.usefixtures("known_rates")
def test_a_dry_run_of_dpo_counts_generated_answers_and_the_copy_of_the_start(
    home: Path, pico_folder: Path, invoke: Invoke
) -> None:
    def memory(**sections: Any) -> dict[str, int]:
        content = {
            "computation": {"mode": "posttraining", "method": "dpo"},
            "training": {"learning_rate": 1e-5, "batch_size": 1, "precision": "fp32", "device": "cpu"},
            "data": {"pretrained_weights": str(pico_folder), "output_dir": str(home / "dpo"), "validation_share": 0.25,
                     "preference_data": str(home / "comparisons.jsonl")},
            **sections,
        }  # fmt: skip
        file = home / "dpo.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        found: dict[str, int] = json.loads(invoke("train", file, "--dry-run", "--json").stdout)["memory"]
        return found

    plain = memory()
    copied = memory(evaluation={"reference_copy": True, "prompts": 64}, generation={"max_new_tokens": 200})
    assert "reference" not in plain
    assert copied["reference"] == plain["weights"]
    # Keys and values of 2 layers and 16 numbers each, in fp32, of 64 rows of more than 200 tokens.
    assert copied["buffers"] > max(plain["buffers"], 64 * 200 * 2 * 2 * 16 * 4)


@pytest.mark.usefixtures("known_rates")
def test_a_dry_run_of_ppo_counts_prompts_iterations_and_steps(
    home: Path, reward_run: Path, config: Write, invoke: Invoke
) -> None:
    words = ("train", config("ppo", run="steps", data={"reward_model": str(reward_run)}), "--dry-run", "--json")
    plan = json.loads(invoke(*words).stdout)
    # 7 prompts, of which 25% are set apart; 4 responses an iteration; 2 passes over 2 parts.
    assert (plan["prompts"]["train"], plan["prompts"]["iteration"]) == (5, 4)
    assert plan["iterations"] == 2
    assert plan["steps"] == {"iteration": 4, "all": 8}
    assert plan["model"]["roles"]["policy"]["parameters"] == BACKBONE + OUTPUT
    assert plan["model"]["roles"]["value model"]["trained"] == BACKBONE + 32
    trained = 2 * BACKBONE + OUTPUT + 32
    assert plan["memory"]["optimizer"] == 8 * trained
    assert plan["memory"]["weights"] == 4 * (4 * BACKBONE + 2 * OUTPUT + 2 * 32)
    # The last, and one more while it is written; nothing is validated, so that there is no best.
    assert plan["disk"]["checkpoints"] == 2 * plan["disk"]["checkpoint"] == 2 * 12 * trained
    assert plan["disk"]["model"] == 4 * (BACKBONE + OUTPUT)
    parts = [plan["time"][name] for name in ("generation", "scoring", "updates")]
    assert plan["time"]["seconds"] == pytest.approx(sum(parts))
    assert min(parts) > 0
    assert plan["time"]["left_out"] == ["sampling and attention to generated tokens"]
    few = json.loads(invoke(*words, "training.max_steps=3").stdout)
    assert (few["iterations"], few["steps"]["all"]) == (1, 3)
    assert not (home / "steps").exists()


def test_responses_are_written_as_fast_as_weights_are_read() -> None:
    # 70 multiplied parameters and 30 of the output embedding; 5 responses of 3 tokens, 2 together: 3 waves.
    known = {"responses": 5, "new_tokens": 3, "together": 2, "output": 30, "number_bytes": 2}
    fast = 1e12 / MATMUL_EFFICIENCY
    read = generation_seconds(SMALL, **known, prompt_tokens=0, operations_a_second=fast, bytes_a_second=10.0)
    assert read == pytest.approx(3 * 3 * 2 * 100 / 10)
    slow = {"operations_a_second": 1 / MATMUL_EFFICIENCY, "bytes_a_second": 1e12}
    assert generation_seconds(SMALL, **known, prompt_tokens=0, **slow) == pytest.approx(5 * 3 * 2 * 100)
    assert generation_seconds(SMALL, **known, prompt_tokens=4, **slow) == pytest.approx(5 * 3 * 200 + 4 * 2 * 70)


@pytest.mark.usefixtures("known_rates")
def test_a_dry_run_of_rlhf_shows_both_phases(home: Path, config: Write, invoke: Invoke) -> None:
    adapters = {"reward_training": {**TRAINING, "trainable": "lora"}, "training": {"trainable": "lora"}}
    file = config("rlhf", run="both", **adapters)
    result = invoke("train", file, "--dry-run")
    assert result.exit_code == 0, result.stderr
    first, second = result.stdout.split("\n\n")
    assert first.splitlines()[0] == "phase 1 of 2: reward model"
    assert second.splitlines()[0] == "phase 2 of 2: policy"
    names = [line.split()[0] for line in second.splitlines()[1:] if not line.startswith(" ")]
    assert names == [
        "model",
        "roles",
        "trains",
        "data",
        "prompts",
        "tokens",
        "steps",
        "memory",
        "disk",
        "time",
        "verdict",
    ]
    assert "1 copy of the weights for 4 roles" in second
    assert "comparisons, those to train on with 18 responses in 9 pairs" in first
    plan = json.loads(invoke("train", file, "--dry-run", "--json").stdout)
    assert plan["reward_model"]["rows"]["train"] == 9
    # The adapters that the first phase trains are those that the reward model and the values begin as.
    trained = plan["reward_model"]["model"]["trained"]
    roles = plan["policy"]["model"]["roles"]
    assert roles["reward model"] == {"parameters": trained, "trained": 0, "is": "an adapter over the policy's weights"}
    assert roles["value model"]["trained"] == trained
    assert not (home / "both").exists()


def test_preview_of_comparisons(home: Path, config: Write, invoke: Invoke) -> None:
    rows = [{**COMPARISONS[0], "margin": 2, "p_human": 0.75}, {**COMPARISONS[1], "tie": True}]
    file = write_jsonl(home / "judged.jsonl", rows)
    words = (f"data.preference_data={file}", "data.validation_share=0")
    result = invoke("data", "preview", config("reward_model", run="preview"), "--rows", 2, *words)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{file}:1"
    assert lines[1].startswith("prompt    ")
    assert "[" not in lines[1]
    assert lines[1].replace("|", "").endswith("###·Assistant:\\n")
    assert lines[2].replace("|", "") == "chosen    [thank·you,·it·comes<eos>]"
    assert lines[3].strip() == f"{lines[2].count('|') + 1} tokens · preferred with probability 0.75, margin 2"
    assert lines[4].replace("|", "") == "rejected  [just·wait<eos>]"
    assert lines[5].strip() == f"{lines[4].count('|') + 1} tokens"
    prompt, chosen, rejected = (lines[place].count("|") + 1 for place in (1, 2, 4))
    assert lines[6].strip() == f"{prompt} tokens of prompt, {prompt + chosen + rejected} in all"
    assert "a tie: either with probability 0.5" in lines[11]
    assert "train: 2 rows read, 2 used" in result.stdout


def test_preview_of_many_responses(home: Path, config: Write, invoke: Invoke) -> None:
    row = {"prompt": "where is it", "responses": ["just wait", "thank you", "it comes"], "scores": [1, 3, 1]}
    file = write_jsonl(home / "groups.jsonl", [row])
    words = (f"data.preference_data={file}", "data.validation_share=0")
    result = invoke("data", "preview", config("reward_model", run="preview"), *words)
    assert result.exit_code == 0, result.stderr
    names = [line.split()[0] for line in result.stdout.splitlines()[1:9] if not line.startswith(" ")]
    assert names == ["prompt", "response", "response", "response", "pairs"]
    assert "2 > 1 (probability 1, margin 0); 1 = 3 (probability 0.5, margin 0); 2 > 3" in result.stdout


def test_what_becomes_of_comparisons_that_are_too_long() -> None:
    whole = EncodedComparison([1, 2, 3], [[4, 5, 6], [4, 7]], (Pair(0, 1),), 0)
    assert response_fates(whole, None, "drop") == ([3, 2], "")
    assert response_fates(whole, 6, "drop") == ([3, 2], "")
    assert response_fates(whole, 5, "drop") == ([0, 0], " · dropped: over max_length 5")
    assert response_fates(whole, 5, "error")[1] == " · an error: over max_length 5"
    assert response_fates(whole, 5, "cut") == ([2, 2], " · cut at 5")
    assert response_fates(whole, 4, "cut") == ([0, 0], " · dropped: two responses of the same tokens, cut at 4")
    assert response_fates(whole, 3, "cut") == ([0, 0], " · dropped: prompt over max_length")


def test_the_second_response_may_be_the_chosen_one() -> None:
    assert [name for name, _ in preferences_of([Pair(1, 0)], 2)] == ["rejected", "chosen"]


def test_preview_shows_what_is_cut_before_it_refuses(config: Write, invoke: Invoke) -> None:
    file = config("reward_model", run="preview")
    whole = invoke("data", "preview", file, "--rows", 1).stdout.splitlines()
    prompt = whole[1].count("|") + 1
    cut = invoke("data", "preview", file, "--rows", 1, f"training.max_length={prompt + 2}", "data.over_length=cut")
    assert cut.exit_code == 0, cut.stderr
    response = cut.stdout.splitlines()[2]
    assert re.fullmatch(r"chosen    \[[^|]+\|[^|]+\]~.+~", response)
    assert f"cut at {prompt + 2}" in cut.stdout.splitlines()[6]
    dropped = invoke("data", "preview", file, "--rows", 1, f"training.max_length={prompt + 2}")
    assert dropped.exit_code == 2
    assert f"dropped: over max_length {prompt + 2}" in dropped.stdout
    assert "comparisons.jsonl" in dropped.stderr


def test_preview_of_prompts(home: Path, reward_run: Path, config: Write, invoke: Invoke) -> None:
    file = config("ppo", run="preview-ppo", data={"reward_model": str(reward_run), "validation_share": 0})
    result = invoke("data", "preview", file, "--rows", 2)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{home / 'prompts.jsonl'}:1"
    assert lines[1].replace("|", "").endswith("###·Assistant:\\n")
    assert lines[2] == f"{lines[1].count('|') + 1} tokens, answered by at most 5"
    assert "train: 7 rows read, 7 used" in result.stdout


def test_preview_of_rlhf_shows_comparisons_and_prompts(config: Write, invoke: Invoke) -> None:
    result = invoke("data", "preview", config("rlhf", run="preview-rlhf"), "--rows", 1)
    assert result.exit_code == 0, result.stderr
    comparisons, prompts = result.stdout.split("\nprompts that the policy answers\n")
    assert "\nchosen    [" in comparisons
    assert "answered by at most 5" in prompts


def test_scores_as_json_lines(home: Path, reward_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("score", reward_run, home / "comparisons.jsonl")
    assert result.exit_code == 0, result.stderr
    scored = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["line"] for row in scored] == list(range(1, 13))
    assert all(len(row["scores"]) == 2 for row in scored)
    assert "pair_accuracy" in result.stderr
    told = json.loads(invoke("score", reward_run / "model", home / "comparisons.jsonl", "--json").stdout)
    better = sum(row["scores"][0] > row["scores"][1] for row in scored)
    assert (told["rows"], told["pair_accuracy"]) == (12, pytest.approx(better / 12))
    output = tmp_path / "scores.jsonl"
    written = invoke("score", reward_run, home / "comparisons.jsonl", "-o", output)
    assert written.stdout == ""
    assert output.read_text(encoding="utf-8") == result.stdout
    assert "12 rows" in written.stderr


def test_a_broken_row_is_reported_with_file_and_line(tmp_path: Path, reward_run: Path, invoke: Invoke) -> None:
    broken = [COMPARISONS[0], {**COMPARISONS[1], "chosen": None}, {**COMPARISONS[2], "rejected": "thank you, it comes"}]
    file = write_jsonl(tmp_path / "broken.jsonl", broken)
    result = invoke("score", reward_run, file)
    assert result.exit_code == 2
    assert f"{file}:2" in result.stderr
    assert f"{file}:3" in result.stderr
    assert result.stdout == ""
    skipped = invoke("score", reward_run, file, "--skip-bad-rows")
    assert [json.loads(line)["line"] for line in skipped.stdout.splitlines()] == [1]


def test_a_reward_model_predicts_no_labels_and_generates_no_text(home: Path, reward_run: Path, invoke: Invoke) -> None:
    rows = home / "comparisons.jsonl"
    for words in (("predict", reward_run, rows), ("generate", reward_run, "-p", "hi"),
                  ("predict", reward_run / "model", rows), ("chat", reward_run)):  # fmt: skip
        result = invoke(*words, text="hi\n")
        assert result.exit_code == 2, words
        assert "a reward model, which scores responses" in result.stderr
        assert f"loopos score {words[1]} FILE" in result.stderr


def test_a_reward_model_is_no_predictor(reward_run: Path) -> None:
    from loopos.config.diagnostics import UserError
    from loopos.evaluation.predictor import Predictor

    with pytest.raises(UserError, match="loopos score"):
        Predictor.open(reward_run)


def test_other_models_give_no_scores(
    home: Path, trained: Any, project: Path, language_run: Path, invoke: Invoke
) -> None:
    assert trained.exit_code == 0
    head = invoke("score", project / "outputs" / "first", home / "comparisons.jsonl")
    assert head.exit_code == 2
    assert "a model of task classification, which scores no responses" in head.stderr
    assert "loopos predict" in head.stderr
    language = invoke("score", language_run, home / "comparisons.jsonl")
    assert language.exit_code == 2
    assert "a language model, which scores no responses" in language.stderr
    nothing = invoke("score", home, home / "comparisons.jsonl")
    assert nothing.exit_code == 2
    assert "no trained model here" in nothing.stderr


def test_the_last_line_of_a_run_says_what_the_model_is_for(
    rewards: dict[str, Any], reward_run: Path, home: Path, aligned: Any, language_run: Path, project: Path, trained: Any
) -> None:
    assert rewards["all"].stdout.splitlines()[-1] == f"  score with it: loopos score {reward_run} FILE"
    assert aligned.stdout.splitlines()[-1] == f'  generate with it: loopos generate {home / "aligned"} -p "..."'
    assert use_of(str(language_run)).endswith('-p "..." --steps')
    assert trained.exit_code == 0
    assert use_of(str(project / "outputs" / "first")).startswith("predict with it: loopos predict ")


def test_a_policy_scores_nothing_and_its_reward_model_is_named(home: Path, aligned: Any, invoke: Invoke) -> None:
    assert aligned.exit_code == 0
    result = invoke("score", home / "aligned", home / "comparisons.jsonl")
    assert result.exit_code == 2
    assert f"the reward model of this run is {home / 'aligned' / 'reward_model'}" in result.stderr
    scored = invoke("score", home / "aligned" / "reward_model", home / "comparisons.jsonl", "--json")
    assert json.loads(scored.stdout)["rows"] == 12


def test_a_first_phase_that_has_begun_is_not_overwritten(
    home: Path, aligned: Any, config: Write, invoke: Invoke
) -> None:
    assert aligned.exit_code == 0
    file = config("rlhf", run="begun")
    (home / "begun" / "reward_model").mkdir(parents=True)
    (home / "begun" / "reward_model" / "events.jsonl").write_text("", encoding="utf-8")
    result = invoke("train", file, "--quiet")
    assert result.exit_code == 2
    assert f"{home / 'begun' / 'reward_model'} already contains a run" in result.stderr


@pytest.mark.parametrize("method", list(BUILTIN))
def test_schema_of_every_method(method: str, invoke: Invoke) -> None:
    result = invoke("schema", "--method", method)
    assert result.exit_code == 0
    described = json.loads(result.stdout)
    assert {"computation", "training", "data"} <= set(described["properties"])
