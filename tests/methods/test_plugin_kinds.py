"""A package of the user's with a variant of every kind: listed, named in configs, used through the real entry points."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import check_kills_leave_no_trace, digest
from own_packages import installed
from pico_runs import class_rows, slow_but, write_jsonl
from preference_runs import ASKED, comparisons, events_of
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import loopos
from loopos.cli.commands import app
from loopos.config.diagnostics import UserError
from loopos.config.pretraining import PretrainingDataSection
from loopos.config.registry import load_plugins
from loopos.data.corpus import load_corpus
from loopos.storage.events import fingerprint, read

PACKAGE = Path(__file__).parents[1] / "plugin_package"
KINDS = ("algorithms", "exporters", "formats", "losses", "merge-methods", "rewards", "trackers")


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    site = tmp_path / "site"
    site.mkdir()
    with installed(site, PACKAGE, "own_variants", monkeypatch):
        yield


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def config_of(folder: Path, weights: Path, method: str, **sections: Mapping[str, Any]) -> dict[str, Any]:
    training = {"learning_rate": 1e-2, "optimizer": "adamw", "precision": "fp32", "seed": 5, "device": "cpu"}
    return {
        **sections,
        "computation": {"mode": "posttraining", "method": method},
        "training": {**training, **sections.get("training", {})},
        "data": {"pretrained_weights": str(weights), "output_dir": str(folder), **sections.get("data", {})},
    }


def policy_config(folder: Path, weights: Path, algorithm: str, **training: object) -> dict[str, Any]:
    """One token is written; 1 for the letters that the row names."""
    rows = write_jsonl(
        folder.parent / "prompts.jsonl", [{"prompt": text, "letters": "abcdefghijklm"} for text in ASKED]
    )
    return config_of(
        folder,
        weights,
        "ppo",
        training={
            "algorithm": algorithm, "batch_size": 60, "max_iterations": 12, "num_epochs": 10000, "inner_epochs": 1,
            "kl_coefficient": 0.0, "whiten_advantages": False, "validate_every": "never", "schedule": "constant",
            "save_every": 5, **training,
        },
        generation={"max_new_tokens": 1, "responses_per_prompt": 4},
        reward={"functions": [{"name": "first_letter"}]},
        data={"prompts": str(rows), "validation_share": 0.0},
    )  # fmt: skip


def test_every_kind_lists_what_the_package_adds() -> None:
    found = {}
    for kind in KINDS:
        rows = json.loads(run("list", kind, "--json").stdout)
        found |= {row["name"]: row["summary"] for row in rows if row["source"].startswith("own_variants.")}
        assert {row["source"] for row in rows} > {"loopos"}
        assert all(row["summary"] for row in rows)
    assert found == {
        "reinforce": "REINFORCE with the mean reward of the iteration as baseline",
        "group_reinforce": "REINFORCE with the mean reward of the responses to the same prompt as baseline",
        "plain_numbers": "One JSON file a tensor, as nested lists",
        "ordered_answers": "A question and its answers, best first",
        "focal": "Focal loss with γ = 2 (classification)",
        "pair_hinge": "Hinge loss of the gap of two scores, with margin 1 (reward_model)",
        "median": "The median of the models, element by element",
        "first_letter": "1 for a response that begins with one of the letters in the row's column `letters`",
        "lines": "One JSON line an event, in the file `numbers.jsonl` of the run",
    }
    assert "own_variants.algorithms" in run("list", "algorithms").stdout


def test_the_kinds_are_listed_and_an_unknown_one_is_refused() -> None:
    others = ("methods", "tool-parsers", "environments", "study-strategies", "study-formats")
    assert set(json.loads(run("list", "--json").stdout)) == {*KINDS, *others}
    refused = run("list", "tracker")
    assert refused.exit_code == 2
    assert 'loopos list: got "tracker"; expected "methods", "losses", ' in refused.stderr
    assert 'did you mean "trackers"?' in refused.stderr


@pytest.mark.parametrize("algorithm", slow_but("reinforce", ["reinforce", "own_variants.algorithms:group_reinforce"]))
def test_an_algorithm_without_a_critic_learns(algorithm: str, tmp_path: Path, pico_folder: Path) -> None:
    """Neither critic nor reference is built, trained, saved or planned; the reward rises."""
    # The last checkpoint is within an iteration, and holds its responses.
    training = {"learning_rate": 2e-2, "minibatches": 2, "max_steps": 31, "save_every": 31, "max_iterations": 16}
    config = policy_config(tmp_path / "run", pico_folder, algorithm, **training)
    loopos.train(config, quiet=True)
    steps, rollouts = events_of(tmp_path / "run", "step"), events_of(tmp_path / "run", "rollout")
    assert (len(steps), len(rollouts)) == (31, 16)
    rewards = [event["reward"] for event in rollouts]
    assert rewards[0] < 0.5
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.3
    assert {"policy_loss", "entropy", "ratio"} <= set(steps[0])
    assert not {"value_loss", "value_clip_share"} & set(steps[0])
    assert not {"kl", "explained_variance"} & set(rollouts[0])
    last = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    saved = set()
    for file in last.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            saved |= set(opened.keys())
    assert {"advantages", "old_logprobs", "policy.causal.model.norm.weight"} <= saved
    assert not [name for name in saved if "critic" in name or name in ("values", "returns", "reference_logprobs")]
    assert (tmp_path / "run" / "report.md").is_file()


def test_the_dry_run_counts_no_critic(tmp_path: Path, pico_folder: Path) -> None:
    file = tmp_path / "run.json"
    plans = {}
    for name, training in {"reinforce": {}, "ppo": {"value_model": "policy"}}.items():
        config = policy_config(tmp_path / "run", pico_folder, name, **training)
        file.write_text(json.dumps(config))
        plans[name] = json.loads(run("train", file, "--dry-run", "--json").stdout)
    roles = {name: plan["model"]["roles"] for name, plan in plans.items()}
    assert set(roles["ppo"]) == {"policy", "reference", "value model"}
    assert set(roles["reinforce"]) == {"policy"}
    assert (plans["ppo"]["model"]["copies"], plans["reinforce"]["model"]["copies"]) == (3, 1)
    policy = roles["reinforce"]["policy"]["parameters"]
    assert plans["reinforce"]["model"]["parameters"] == plans["reinforce"]["model"]["trained"] == policy
    # 12 iterations of 60 responses: 4 to each of 15 prompts.
    assert plans["reinforce"]["iterations"] == plans["ppo"]["iterations"] == 12
    planned = run("plan", file, "--gpus", 1, "--memory", "80GiB", "--json", "training.algorithm=reinforce")
    assert planned.exit_code in (0, 3), planned.stderr


def test_rlhf_takes_an_algorithm_without_a_critic_too(tmp_path: Path, pico_folder: Path) -> None:
    # Both phases read the rows in the format of the package.
    ordered = [{"question": row["prompt"], "answers": [row["chosen"], row["rejected"]]} for row in comparisons(24)]
    data = {"preference_data": str(write_jsonl(tmp_path / "rows.jsonl", ordered)), "format": "ordered_answers"}
    training = {"algorithm": "reinforce", "kl_coefficient": 0.1, "value_model": "policy", "batch_size": 8}
    config = config_of(tmp_path / "run", pico_folder, "rlhf", training=training, data=data)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config))
    planned = run("train", file, "--dry-run", "--json")
    assert 'training.value_model has no effect: the algorithm "reinforce" has no critic' in planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["reward_model"]["rows"]["pairs"] == plan["policy"]["prompts"]["train"] > 10
    roles = plan["policy"]["model"]["roles"]
    # The penalty on the KL needs the reference.
    assert set(roles) == {"policy", "reference", "reward model"}


@pytest.mark.slow
def test_with_adapters_and_no_critic_one_adapter_trains(tmp_path: Path, pico_folder: Path) -> None:
    training = {"trainable": "lora", "kl_coefficient": 0.1, "max_iterations": 1}
    config = policy_config(tmp_path / "run", pico_folder, "reinforce", **training)
    loopos.train(config, quiet=True)
    (rollout,) = events_of(tmp_path / "run", "rollout")
    assert rollout["kl"] == pytest.approx(0.0, abs=1e-4)
    names = set(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))
    assert names
    last = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    saved = {name for file in last.glob("weights*.safetensors") for name in load_file(file)}
    assert {name.split(".lora_")[1].split(".")[1] for name in saved if ".lora_" in name} == {"default"}
    assert not [name for name in saved if "critic" in name]


@pytest.mark.parametrize(
    "sections",
    slow_but(
        {"guards": {"kl": 5.0}},
        [
            {"training": {"kl_in": "loss", "kl_coefficient": 0.1}},
            {"training": {"kl_coefficient": 0.1, "kl_target": 1.0}},
            {"guards": {"kl": 5.0}},
            {"evaluation": {"kl_limit": 5.0}},
        ],
    ),
    ids=str,
)
def test_what_reads_the_kl_brings_the_reference(sections: dict[str, Any], tmp_path: Path, pico_folder: Path) -> None:
    config = policy_config(tmp_path / "run", pico_folder, "reinforce", max_iterations=1, **sections.pop("training", {}))
    loopos.train(config | sections, quiet=True)
    (rollout,) = events_of(tmp_path / "run", "rollout")
    assert rollout["kl"] == pytest.approx(0.0, abs=1e-4)


def bits_of(folder: Path) -> dict[str, str]:
    last = max((folder / "checkpoints").glob("step-*"))
    files = [folder / "model" / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    return {file.name: digest(file) for file in files} | {"metrics": fingerprint(folder / "events.jsonl")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_run_without_a_critic_resumes_to_the_same_bits(tmp_path: Path, pico_folder: Path) -> None:
    training = {"inner_epochs": 2, "minibatches": 2, "save_every": 1, "max_iterations": 6}
    (tmp_path / "one").mkdir()
    began = time.monotonic()
    loopos.train(policy_config(tmp_path / "one" / "run", pico_folder, "group_reinforce", **training), quiet=True)
    seconds = time.monotonic() - began
    (tmp_path / "two").mkdir()
    config = policy_config(tmp_path / "two" / "run", pico_folder, "group_reinforce", **training)
    check_kills_leave_no_trace(
        lambda: loopos.train(config, resume=True, quiet=True),
        tmp_path / "two" / "run",
        bits_of,
        bits_of(tmp_path / "one" / "run"),
        kills=2,
        seconds=seconds,
        latest=0.7,
        seed="critic-free",
    )


def test_another_algorithm_is_another_run(tmp_path: Path, pico_folder: Path) -> None:
    config = policy_config(tmp_path / "run", pico_folder, "reinforce", max_iterations=2)
    loopos.train(config, quiet=True)
    config["training"] |= {"algorithm": "group_reinforce", "max_iterations": 3}
    with pytest.raises(UserError, match=r"training\.algorithm: was reinforce, is group_reinforce"):
        loopos.train(config, resume=True, quiet=True)


@pytest.mark.slow
def test_other_answers_are_another_run(tmp_path: Path, pico_folder: Path) -> None:
    """The columns that a reward reads decide what is learned, though no token shows them."""
    config = policy_config(tmp_path / "run", pico_folder, "reinforce", max_iterations=2)
    loopos.train(config, quiet=True)
    rows = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])["metrics"]["rows"]
    assert rows == ["5 rows read, 5 used; for reward functions only: letters"]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text, "letters": "n"} for text in ASKED])
    config["training"]["max_iterations"] = 3
    with pytest.raises(UserError, match="the columns of the prompts' rows differ"):
        loopos.train(config, resume=True, quiet=True)


def test_losses_of_the_package_train(tmp_path: Path, pico_folder: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", class_rows(24))
    first = {}
    for loss in (None, "cross_entropy", "focal", "own_variants.losses:focal"):
        folder = tmp_path / str(loss).replace(":", "-")
        model = {"loss": loss, "head_init_std": 0.0}
        data = {"training_data": str(rows)}
        loopos.train(config_of(folder, pico_folder, "fine_tuning", model=model, data=data), quiet=True)
        first[loss] = [event["loss"] for event in events_of(folder, "step")]
    assert first[None] == first["cross_entropy"]
    assert first["focal"] == first["own_variants.losses:focal"]
    # A head of zeros gives each of C classes the probability 1/C.
    classes = len({row["label"] for row in class_rows(24)})
    assert first[None][0] == pytest.approx(math.log(classes), rel=1e-5)
    assert first["focal"][0] == pytest.approx((1 - 1 / classes) ** 2 * math.log(classes), rel=1e-5)
    assert first["focal"][-1] < first["focal"][0]


def test_a_loss_of_pairs_and_a_format_of_the_package_train(tmp_path: Path, pico_folder: Path) -> None:
    plain = comparisons(24)
    ordered = [{"question": row["prompt"], "answers": [row["chosen"], row["rejected"]]} for row in plain]
    found = {}
    for name, rows, loss in (
        ("plain", [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in plain], "bradley_terry"),
        ("ordered", ordered, "bradley_terry"),
        ("pair_hinge", ordered, "pair_hinge"),
    ):
        file = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        data = {"preference_data": str(file), **({"format": "ordered_answers"} if rows is ordered else {})}
        config = config_of(tmp_path / name, pico_folder, "reward_model", data=data, reward={"loss": loss})
        loopos.train(config, quiet=True)
        found[name] = events_of(tmp_path / name, "step")
    assert found["plain"] == found["ordered"]
    assert found["pair_hinge"][0]["loss"] == pytest.approx(1.0, abs=0.3)
    assert found["plain"][0]["loss"] == pytest.approx(math.log(2), abs=0.2)
    assert found["pair_hinge"][-1]["loss"] < found["pair_hinge"][0]["loss"]


def test_a_row_that_is_not_in_the_format_is_named(tmp_path: Path, pico_folder: Path) -> None:
    file = write_jsonl(
        tmp_path / "rows.jsonl", [{"question": "why", "answers": ["yes", "no"]}, {"question": "why", "answers": ["a"]}]
    )
    data = {"preference_data": str(file), "format": "ordered_answers"}
    with pytest.raises(UserError, match=r"rows\.jsonl:2: row: got 1 answers; expected at least 2"):
        loopos.train(config_of(tmp_path / "run", pico_folder, "reward_model", data=data), quiet=True)
    with pytest.raises(
        UserError,
        match=r'"pairs"; expected "nectar", "ultrafeedback", "ordered_answers", null or "module:name" of your own',
    ):
        loopos.train(
            config_of(tmp_path / "run", pico_folder, "reward_model", data={**data, "format": "pairs"}), quiet=True
        )
    write_jsonl(file, [{"answers": ["yes", "no"]}])
    with pytest.raises(
        UserError, match=r"format ordered_answers: raised KeyError at .*formats\.py:\d+: 'question'\n.*rows\.jsonl:1"
    ):
        loopos.train(config_of(tmp_path / "run", pico_folder, "reward_model", data=data), quiet=True)


def test_pretraining_reads_rows_in_a_format_too(tmp_path: Path) -> None:
    (tmp_path / "site" / "joined.py").write_text(
        "def title_and_body(row):\n    return {'text': row['title'] + ' ' + row['body']}\n"
    )
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"title": "one", "body": "two"}, {"title": "three", "body": "four"}])
    (tmp_path / "text.txt").write_text("one two\n\nthree four\n")
    section = {"output_dir": str(tmp_path / "run"), "output_weights": str(tmp_path / "weights.bin")}
    named = PretrainingDataSection.model_validate(
        {**section, "training_data": str(rows), "format": "joined:title_and_body"}
    )
    assert load_corpus(named, str(rows)).documents == ("one two", "three four")
    assert load_corpus(PretrainingDataSection.model_validate(section), str(tmp_path / "text.txt")).documents == (
        "one two",
        "three four",
    )
    with pytest.raises(UserError, match=r"data\.format: got a format of rows; expected no format"):
        load_corpus(named, str(tmp_path / "text.txt"))


def test_a_merge_method_and_an_exporter_of_the_package_write(tmp_path: Path, pico_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = []
    for seed in range(3):
        model = AutoModelForCausalLM.from_pretrained(pico_folder)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        folders.append(tmp_path / f"model{seed}")
        model.save_pretrained(folders[-1])
        AutoTokenizer.from_pretrained(pico_folder).save_pretrained(folders[-1])
    for name, method in {"named": "median", "own": "own_variants.merging:median"}.items():
        merged = run("merge", *folders, "--method", method, "-o", tmp_path / name)
        assert merged.exit_code == 0, merged.stderr
        tensors = [load_file(folder / "model.safetensors") for folder in folders]
        for key, value in load_file(tmp_path / name / "model.safetensors").items():
            assert torch.equal(value, torch.stack([each[key] for each in tensors]).median(0).values)
    (tmp_path / "site" / "empty.py").write_text("def nothing(*parts):\n    return None\n")
    refused = run("merge", *folders, "--method", "empty:nothing", "-o", tmp_path / "no")
    assert 'method "empty:nothing": its function returned NoneType; expected one tensor' in refused.stderr
    refused = run("export", folders[0], "-o", tmp_path / "no", "--format", "empty:nothing")
    assert "export format empty:nothing: wrote nothing" in refused.stderr
    assert not (tmp_path / "no").exists()
    refused = run("merge", *folders[:2], "--method", "median", "-o", tmp_path / "two")
    assert "2 models with median; expected at least 3" in refused.stderr
    exported = run("export", tmp_path / "named", "-o", tmp_path / "out", "--format", "plain_numbers")
    assert exported.exit_code == 0, exported.stderr
    numbers = json.loads((tmp_path / "out" / "model.norm.weight.json").read_text())
    assert (
        torch.tensor(numbers).tolist()
        == load_file(tmp_path / "named" / "model.safetensors")["model.norm.weight"].tolist()
    )
    assert "plain_numbers" in (tmp_path / "out" / "README.md").read_text()
    assert "not compared" in (tmp_path / "out" / "report.md").read_text()


def test_a_tracker_of_the_package_gets_every_number(tmp_path: Path, pico_folder: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", class_rows(24))
    training = {"trackers": ["lines"], "num_epochs": 1}
    config = config_of(
        tmp_path / "run", pico_folder, "fine_tuning", training=training, data={"training_data": str(rows)}
    )
    loopos.train(config, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "numbers.jsonl").read_text().splitlines()]
    events = [event for event in read(tmp_path / "run" / "events.jsonl") if event["step"] is not None]
    logged = [(event["step"], event["metrics"]["loss"]) for event in events if event["event"] == "step"]
    assert [(line["step"], line["step/loss"]) for line in lines if "step/loss" in line] == logged
    assert len(logged) >= 2
    assert any("validation/accuracy" in line for line in lines)


MISTAKES = [
    ("ppo", {"training": {"algorithm": "reinforc"}}, "training.algorithm", '"reinforc"', "reinforce"),
    (
        "ppo",
        {"reward": {"functions": [{"name": "first_lettr"}]}},
        "reward.functions.0.name",
        '"first_lettr"',
        "first_letter",
    ),
    ("fine_tuning", {"model": {"loss": "fokal"}}, "model.loss", '"fokal"', "focal"),
    ("reward_model", {"reward": {"loss": "pair_hing"}}, "reward.loss", '"pair_hing"', "pair_hinge"),
    ("reward_model", {"data": {"format": "ordered_answer"}}, "data.format", '"ordered_answer"', "ordered_answers"),
    ("fine_tuning", {"training": {"trackers": ["line"]}}, "training.trackers.0", '"line"', "lines"),
]


@pytest.mark.parametrize(("method", "sections", "field", "actual", "meant"), MISTAKES, ids=[row[2] for row in MISTAKES])
def test_an_unknown_name_is_a_diagnostic(
    method: str, sections: dict[str, Any], field: str, actual: str, meant: str, tmp_path: Path, pico_folder: Path
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config_of(tmp_path / "run", pico_folder, method, **sections), indent=1))
    result = run("validate", file)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if f": {field}: " in line]
    where, _, text = line.partition(f": {field}: ")
    source, number, column = where.rsplit(":", 2)
    assert file.read_text().splitlines()[int(number) - 1][int(column) - 1 :].startswith(actual)
    assert source == str(file)
    assert text.startswith(f'got {actual}; expected "')
    assert text.endswith(' or "module:name" of your own')
    assert f'did you mean "{meant}"?' in result.stderr


def test_an_unknown_name_is_found_without_torch(tmp_path: Path, pico_folder: Path) -> None:
    config = config_of(tmp_path / "run", pico_folder, "ppo", training={"algorithm": "pp"})
    (tmp_path / "run.json").write_text(json.dumps(config))
    program = (
        "import sys\nfrom loopos.cli.commands import app\n"
        f"code = app(['validate', {str(tmp_path / 'run.json')!r}], standalone_mode=False)\n"
    )
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom loopos.cli.commands import app\n"
        f"found = CliRunner().invoke(app, ['validate', {str(tmp_path / 'run.json')!r}])\n"
        "assert 'training.algorithm: got \"pp\"' in found.stderr, found.output\n"
        "listed = CliRunner().invoke(app, ['list', 'merge-methods'])\n"
        "assert 'slerp' in listed.stdout\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


def test_what_an_algorithm_returns_is_checked(tmp_path: Path, pico_folder: Path) -> None:
    (tmp_path / "site" / "wrong.py").write_text(
        "from loopos import register_algorithm\n\n\n"
        "@register_algorithm('flat')\ndef flat(inputs):\n    return inputs.scores\n\n\n"
        "@register_algorithm('mean', policy_loss=lambda inputs: (inputs.logprobs * inputs.advantages).mean())\n"
        "def mean(inputs):\n    return inputs.rewards\n"
    )
    for name, message in {
        "flat": r"returned \[\[60\]\]; expected advantages of shape \[60, 1\]",
        "mean": r"its loss has shape \[\]",
    }.items():
        config = policy_config(tmp_path / name, pico_folder, f"wrong:{name}")
        with pytest.raises(UserError, match=message):
            loopos.train(config, quiet=True)
    config = policy_config(tmp_path / "none", pico_folder, "wrong:nothing")
    with pytest.raises(UserError) as refused:
        loopos.train(config, quiet=True)
    assert str(refused.value).startswith(
        "config: training.algorithm: got \"wrong:nothing\" (module 'wrong' has no attribute 'nothing'); expected \"ppo\", "
    )
    assert str(refused.value).endswith(' or "module:name" of your own')
    with pytest.raises(
        UserError, match=r"json:dumps\" \(not registered; decorate the function with @loopos\.register_algo"
    ):
        loopos.train(policy_config(tmp_path / "none", pico_folder, "json:dumps"), quiet=True)
    config = policy_config(tmp_path / "none", pico_folder, "group_reinforce")
    config["generation"]["responses_per_prompt"] = 1
    with pytest.raises(UserError, match=r"generation\.responses_per_prompt: got 1 with algorithm \"group_reinforce\""):
        loopos.train(config, quiet=True)


def test_a_loss_that_returns_a_mean_is_refused(tmp_path: Path, pico_folder: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", class_rows(24))
    model, data = {"loss": "own_variants.losses:mean_of_rows"}, {"training_data": str(rows)}
    with pytest.raises(
        UserError, match=r"mean_of_rows\": its function returned \[\]; expected \[\d+\], one number for each row"
    ):
        loopos.train(config_of(tmp_path / "run", pico_folder, "fine_tuning", model=model, data=data), quiet=True)


@pytest.mark.parametrize(
    ("method", "field", "name", "task", "message"),
    [
        (
            "fine_tuning",
            "model",
            "own_variants.losses:pair_hinge",
            None,
            '"own_variants.losses:pair_hinge", a loss of reward_model',
        ),
        (
            "fine_tuning",
            "model",
            "mse",
            "classification",
            '"mse" with task classification; expected "cross_entropy", "focal"',
        ),
        (
            "reward_model",
            "reward",
            "own_variants.losses:focal",
            None,
            '"own_variants.losses:focal", a loss of fine_tuning',
        ),
        ("reward_model", "reward", "own_variants.losses:nothing", None, "has no attribute 'nothing'"),
    ],
)
def test_a_loss_of_another_method_or_task_is_refused(
    method: str, field: str, name: str, task: str | None, message: str, tmp_path: Path, pico_folder: Path
) -> None:
    sections = {field: {"loss": name, **({"task": task} if task else {})}}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config_of(tmp_path / "run", pico_folder, method, **sections)))
    result = run("validate", file)
    assert result.exit_code == 2
    assert f"{field}.loss: got" in result.stderr
    assert message in result.stderr


@pytest.mark.parametrize(
    ("method", "sections", "field"),
    [
        (
            "ppo",
            {"training": {"algorithm": "own_variants:nothing"}, "reward": {"functions": [{"name": "exact"}]}},
            "training.algorithm",
        ),
        ("fine_tuning", {"training": {"trackers": ["own_variants:nothing"]}}, "training.trackers.0"),
        ("reward_model", {"data": {"format": "own_variants:nothing"}}, "data.format"),
    ],
)
def test_a_name_that_cannot_be_imported_is_one_diagnostic(
    method: str, sections: dict[str, Any], field: str, tmp_path: Path, pico_folder: Path
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", class_rows(4))
    sections["data"] = {"training_data": str(rows), **sections.get("data", {})}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config_of(tmp_path / "run", pico_folder, method, **sections)))
    result = run("validate", file)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    got = "got \"own_variants:nothing\" (module 'own_variants' has no attribute 'nothing'); expected "
    assert f": {field}: {got}" in line
    assert line.endswith('"module:name" of your own')


def test_a_module_of_ones_own_that_raises_is_one_diagnostic(tmp_path: Path, pico_folder: Path) -> None:
    (tmp_path / "site" / "raising.py").write_text("1 / 0\n")
    file = tmp_path / "run.json"
    file.write_text(json.dumps(policy_config(tmp_path / "run", pico_folder, "raising:thing")))
    result = run("validate", file)
    assert result.exit_code == 2
    assert 'training.algorithm: got "raising:thing" (ZeroDivisionError: division by zero); expected' in result.stderr
    result = run("export", pico_folder, "-o", tmp_path / "no", "--format", "raising:thing")
    assert '"raising:thing": ZeroDivisionError: division by zero' in result.stderr


def test_a_package_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for text, message in (
        ("1 / 0\n", "ZeroDivisionError"),
        (
            "from loopos import register_loss\nregister_loss('mse', methods=('fine_tuning',))(print)\n",
            '"mse" is already registered by loopos',
        ),
    ):
        (broken / "bad_package.py").write_text(text)
        with installed(broken / str(len(text)), broken, "bad_package", monkeypatch):
            result = run("list", "losses")
            assert (result.exit_code, "the package bad-package" in result.stderr) == (2, True)
            with pytest.raises(UserError, match=f"the package bad-package cannot be imported .*{message}"):
                load_plugins()
