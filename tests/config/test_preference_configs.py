"""The configs of reward_model, ppo and rlhf: the guide's own, broken keys, contradictions, files, notes, the phases of
rlhf, the schemas.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import ConfigError, Diagnostic
from loopos.config.load import LoadedConfig, Methods, load, schema
from loopos.config.ppo import PpoConfig
from loopos.config.reward_model import RewardModelConfig
from loopos.config.rlhf import RlhfConfig
from loopos.config.sections import MethodConfig

GUIDE = Path(__file__).parents[2] / "configs" / "rlhf.json"
ALL: Methods = {
    ("posttraining", "reward_model"): RewardModelConfig,
    ("posttraining", "ppo"): PpoConfig,
    ("posttraining", "rlhf"): RlhfConfig,
}
ROWS = {"reward_model": "preference_data", "ppo": "prompts", "rlhf": "preference_data"}
Loads = Callable[..., LoadedConfig]
Faults = Callable[..., tuple[Diagnostic, ...]]


def written(method: str) -> str:
    """A valid config of the method."""
    data = {"pretrained_weights": "smollm2-135m", ROWS[method]: "rows.jsonl", "output_dir": "outputs/run"}
    if method == "ppo":
        data["reward_model"] = "scorer"
    sections = {
        "model": {"num_layers": 6},
        "computation": {"mode": "posttraining", "method": method},
        "training": {"learning_rate": 0.00001},
        "data": data,
    }
    return json.dumps(sections, indent=1)


@pytest.fixture
def load_preference(folder: Path) -> Loads:
    """`load_preference(text or method, overrides)`, in a folder with a reward model, a classifier and broken ones."""
    for name, description in {
        "scorer": '{"format": 1, "task": "reward"}',
        "run/model": '{"format": 1, "task": "reward"}',
        "classifier": '{"format": 1, "task": "classification"}',
        "talker": '{"format": 1}',
        "broken": "{",
    }.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "loopos.json").write_text(description)
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "events.jsonl").write_text("{}\n")
    (folder / "empty").mkdir()

    def loaded(text: str, overrides: Sequence[str] = ()) -> LoadedConfig:
        (folder / "run.json").write_text(written(text) if text in ROWS else text)
        return load("run.json", overrides, ALL)

    return loaded


@pytest.fixture
def preference_diagnostics(load_preference: Loads) -> Faults:
    def diagnostics(text: str, overrides: Sequence[str] = ()) -> tuple[Diagnostic, ...]:
        try:
            load_preference(text, overrides)
        except ConfigError as error:
            return error.diagnostics
        return ()

    return diagnostics


def test_the_guide_s_config_is_valid_but_for_its_missing_files(preference_diagnostics: Faults) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    weights, rows = preference_diagnostics(text)
    assert (weights.field, weights.line) == ("data.pretrained_weights", 22)
    assert (rows.field, rows.line) == ("data.preference_data", 23)
    assert 'one row looks like {"prompt": "Where is my parcel?", "chosen": ' in rows.hint
    assert ", or lines: Prompt: Where is my parcel? / Chosen: " in rows.hint
    assert json.loads(text) == {
        "model": {
            "type": "transformer", "d_model": 384, "num_heads": 8, "num_layers": 6, "d_ff": 1536, "vocab_size": 16000
        },
        "computation": {"mode": "posttraining", "method": "rlhf"},
        "training": {
            "learning_rate": 1e-06, "clip_epsilon": 0.2, "kl_coefficient": 0.1, "batch_size": 8, "num_epochs": 1
        },
        "data": {
            "pretrained_weights": "models/pretrained_model.bin",
            "preference_data": "data/human_preferences.txt",
            "output_dir": "outputs/rlhf",
        },
    }  # fmt: skip


def test_the_guide_s_config_with_its_files_and_its_phases(load_preference: Loads, folder: Path) -> None:
    for name in ("models/pretrained_model.bin", "data/human_preferences.txt"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"x")
    loaded = load_preference(GUIDE.read_text(encoding="utf-8"))
    config = loaded.config
    assert isinstance(config, RlhfConfig)
    assert loaded.notes == []
    training = config.training
    assert (training.kl_coefficient, training.schedule, training.epsilon, training.optimizer) == (
        *(0.1, "linear", 1e-5, "adamw"),
    )
    first, second = config.reward_model_config(), config.ppo_config()
    assert (first.training.learning_rate, first.training.optimizer) == (1e-5, "adamw")
    assert (first.training.batch_size, first.training.num_epochs) == (8, 1)
    assert (first.data.source, first.data.output_dir) == ("data/human_preferences.txt", "outputs/rlhf/reward_model")
    assert (second.data.source, second.data.output_dir) == ("data/human_preferences.txt", "outputs/rlhf")
    assert second.data.reward_model == "outputs/rlhf/reward_model/model"
    assert second.training == training
    assert first.model == second.model == config.model
    assert (first.computation.method, second.computation.method) == ("reward_model", "ppo")
    assert list(first.check()) == list(second.check()) == []


def test_the_phases_take_what_is_theirs(load_preference: Loads, folder: Path) -> None:
    (folder / "prompts.jsonl").write_text("{}")
    overrides = [
        'reward_training={"learning_rate": 0.002, "num_epochs": 5}',
        *("reward.heads=4", "rewards.ensemble_penalty=0.5", "generation.max_new_tokens=9", "evaluation.prompts=3"),
        *("data.chat_template=none", "data.tokenizer=a/b", "data.over_length=cut", "data.max_prompt_tokens=30"),
        *('data.columns={"prompt": "asked"}', "data.validation_data=rows.jsonl", "data.max_rows=7"),
    ]
    config = load_preference("rlhf", overrides).config
    assert isinstance(config, RlhfConfig)
    first, second = config.reward_model_config(), config.ppo_config()
    assert (first.training.learning_rate, first.training.num_epochs, first.reward.heads) == (0.002, 5, 4)
    assert (second.training.learning_rate, second.training.num_epochs) == (0.00001, 3)
    assert (second.reward.ensemble_penalty, second.generation.max_new_tokens, second.evaluation.prompts) == (0.5, 9, 3)
    assert (first.data.over_length, second.data.over_length, second.data.max_prompt_tokens) == ("cut", "drop", 30)
    for data in (first.data, second.data):
        assert (data.chat_template, data.tokenizer, data.pretrained_weights) == ("none", "a/b", "smollm2-135m")
        assert (data.columns, data.validation_data, data.max_rows) == ({"prompt": "asked"}, "rows.jsonl", 7)

    own = load_preference("rlhf", [*overrides, "data.prompts=prompts.jsonl"]).config
    assert isinstance(own, RlhfConfig)
    second = own.ppo_config()
    assert (second.data.source, second.data.tokenizer) == ("prompts.jsonl", "a/b")
    assert (second.data.columns, second.data.validation_data, second.data.max_rows) == ({}, None, None)
    assert own.reward_model_config() == first


def test_preferences_under_their_other_name_serve_both_phases(load_preference: Loads) -> None:
    overrides = ["data.preference_data=null", "data.training_data=rows.jsonl"]
    config = load_preference("rlhf", overrides).config
    assert isinstance(config, RlhfConfig)
    assert config.reward_model_config().data.source == config.ppo_config().data.source == "rows.jsonl"


@pytest.mark.parametrize("method", list(ROWS))
def test_a_resolved_config_is_a_valid_config(load_preference: Loads, method: str) -> None:
    first = load_preference(method, ["data.max_length=512", 'data.columns={"prompt": "asked"}']).config
    assert load_preference(json.dumps(first.model_dump(mode="json"))).config == first


def test_the_estimator_of_the_penalty(load_preference: Loads) -> None:
    def estimator(*overrides: str) -> str:
        config = load_preference("ppo", overrides).config
        assert isinstance(config, PpoConfig)
        return config.training.penalty_estimator

    assert estimator() == "k1"
    assert estimator("training.kl_in=loss") == "k2"
    assert estimator("training.kl_estimator=k3") == "k3"


def test_what_the_ratio_is_held_against(load_preference: Loads) -> None:
    def held(*overrides: str) -> str:
        config = load_preference("ppo", overrides).config
        assert isinstance(config, PpoConfig)
        return config.old_logprobs

    assert held() == held("rollout.engine=ray") == "forward"
    assert held("training.old_logprobs=engine") == "engine"
    assert held("rollout.engine=ray", "rollout.max_staleness=1") == "engine"
    assert held("rollout.engine=ray", "rollout.max_staleness=1", "rollout.importance_cap=2") == "forward"


# (method, overrides, field, piece of what is expected)
WRONG: list[tuple[str, list[str], str, str]] = [
    ("reward_model", ["data.preference_data=null"], "data.preference_data", "the rows to train on"),
    ("reward_model", ["data.training_data=rows.jsonl"], "data.training_data", "one of the two"),
    ("reward_model", ["training.metric=accuracy"], "training.metric", '"loss", "pair_accuracy", "step_accuracy"'),
    (
        "reward_model",
        ['training.early_stopping={"patience": 1, "metric": "reward"}'],
        "training.early_stopping.metric",
        '"loss", "pair_accuracy", "step_accuracy"',
    ),
    ("reward_model", ["data.validation_share=0", "training.schedule=plateau"], "training.schedule", "another schedule"),
    ("reward_model", ["training.freeze_layers=7"], "training.freeze_layers", "at most num_layers (6)"),
    ("reward_model", ["training.trainable=head", "training.freeze_layers=1"], "training.freeze_layers", "0, or"),
    ("reward_model", ["training.momentum=0.5"], "training.momentum", "0, or optimizer sgd or muon"),
    ("reward_model", ["training.warmup=5", "training.max_steps=5"], "training.warmup", "fewer than max_steps (5)"),
    ("reward_model", ["data.pretrained_weights=new", "data.tokenizer=a/b"], "model", "need all five sizes"),
    ("reward_model", ["data.streaming=true"], "data.streaming", "data.max_rows"),
    ("reward_model", ['data.columns={"prompt": "a", "chosen": "a"}'], "data.columns.chosen", "one role per column"),
    ("reward_model", ["reward.process.aggregation=mean"], "reward.process.aggregation", '"product", "min" or "last"'),
    ("reward_model", ["reward.process.step_separator="], "reward.process.step_separator", "text"),
    ("reward_model", ['data.columns={"label": "a"}'], "data.columns.label", '"prompt", "chosen"'),
    ("reward_model", ["data.chat_template=x.jinja"], "data.chat_template", '"none" or a file'),
    ("reward_model", ["data.max_dropped_share=2"], "data.max_dropped_share", "a number >= 0 and <= 1"),
    ("reward_model", ["data.validation_data=none.jsonl"], "data.validation_data", "csv, tsv"),
    (
        "reward_model",
        ["data.pretrained_weights=classifier", "data.output_dir=classifier"],
        "data.output_dir",
        "another",
    ),
    ("reward_model", ["reward.center_rewards=-1"], "reward.center_rewards", "a number >= 0"),
    ("reward_model", ["reward.heads=0"], "reward.heads", "a whole number >= 1"),
    ("reward_model", ["training.clip_epsilon=0.2"], "training.clip_epsilon", "a key of training"),
    ("ppo", ["data.prompts=null"], "data.prompts", "the rows to train on"),
    ("ppo", ["data.training_data=rows.jsonl"], "data.training_data", "one of the two"),
    ("ppo", ["data.reward_model=null"], "data.reward_model", "a reward model, or functions"),
    ("ppo", ["reward.model_weight=0"], "reward.model_weight", "other than 0"),
    (
        "ppo",
        ["data.reward_model=null", "training.value_model=policy", 'reward.functions=[{"name": "a:b", "weight": 0}]'],
        "reward.functions",
        "other than 0",
    ),
    (
        "ppo",
        ["data.reward_model=null", 'reward.functions=[{"name": "a:b"}]'],
        "training.value_model",
        '"policy" or "shared"',
    ),
    ("ppo", ['reward.functions=[{"name": "lengths"}]'], "reward.functions.0.name", '"module:name"'),
    ("ppo", ['reward.functions=[{"weight": 1}]'], "reward.functions.0.name", '"module:name"'),
    ("ppo", ["training.trainable=head"], "training.trainable", '"all" or "lora"'),
    ("ppo", ["training.kl_in=loss", "training.kl_estimator=k1"], "training.kl_estimator", '"k2", "k3", or nothing'),
    ("ppo", ["training.kl_target=6", "training.kl_coefficient=0"], "training.kl_target", "kl_coefficient > 0"),
    ("ppo", ["training.metric=loss"], "training.metric", '"reward" or null'),
    (
        "ppo",
        ['training.early_stopping={"patience": 1, "metric": "accuracy"}'],
        "training.early_stopping.metric",
        '"reward" or null',
    ),
    ("ppo", ["training.early_stopping.patience=1", "evaluation.prompts=0"], "training.early_stopping", "at least 1"),
    ("ppo", ["training.schedule=plateau", "evaluation.prompts=0"], "training.schedule", "another schedule"),
    (
        "ppo",
        ["training.early_stopping.patience=1", "data.validation_share=0", "evaluation.prompts=0"],
        "training.early_stopping",
        "validation rows",
    ),
    ("ppo", ["training.schedule=plateau", "training.validate_every=never"], "training.schedule", "another schedule"),
    ("ppo", ["training.validate_every=epoch"], "training.validate_every", 'a whole number >= 1 or "never"'),
    ("ppo", ["training.save_every=epoch"], "training.save_every", '"iteration", "validation" or "never"'),
    ("ppo", ["training.clip_epsilon=1"], "training.clip_epsilon", "a number > 0 and < 1"),
    ("ppo", ["training.dual_clip=1"], "training.dual_clip", "a number > 1"),
    ("ppo", ["training.discount=0"], "training.discount", "a number > 0 and <= 1"),
    ("ppo", ["training.gae_lambda=1.1"], "training.gae_lambda", "a number >= 0 and <= 1"),
    ("ppo", ["training.kl_report=k4"], "training.kl_report", '"k1", "k2" or "k3"'),
    ("ppo", ["training.old_logprobs=cache"], "training.old_logprobs", '"forward" or "engine"'),
    ("ppo", ["training.value_clip=0"], "training.value_clip", "a number > 0"),
    ("ppo", ["generation.temperature=0"], "generation.temperature", "a number > 0"),
    ("ppo", ['generation.stop="END"'], "generation.stop", "a list, each text"),
    ("ppo", ["generation.missing_end_penalty=-1"], "generation.missing_end_penalty", "a number >= 0"),
    ("ppo", ["data.max_length=64"], "generation.max_new_tokens", "fewer than max_length (64)"),
    ("ppo", ["data.max_length=100", "data.max_prompt_tokens=37"], "data.max_prompt_tokens", "at most 36"),
    ("ppo", ["data.over_length=cut"], "data.over_length", '"drop" or "error"'),
    ("ppo", ["guards.length_ratio=1"], "guards.length_ratio", "a number > 1"),
    ("ppo", ["guards.entropy_share=1.5"], "guards.entropy_share", "a number >= 0 and < 1"),
    ("ppo", ["evaluation.best_of=[4, 0]"], "evaluation.best_of.1", "a whole number >= 1"),
    ("ppo", ["data.reward_model=scorers"], "data.reward_model", "finished reward_model run"),
    ("ppo", ['data.reward_model=["run", "scorers"]'], "data.reward_model.1", "finished reward_model run"),
    ("ppo", ["data.reward_model=[]"], "data.reward_model", "at least 1"),
    ("ppo", ["data.reward_model=classifier"], "data.reward_model", "finished reward_model run"),
    ("ppo", ["data.reward_model=talker"], "data.reward_model", "finished reward_model run"),
    ("ppo", ["data.reward_model=broken"], "data.reward_model", "finished reward_model run"),
    ("ppo", ["data.reward_model=unfinished"], "data.reward_model", "finished reward_model run"),
    ("ppo", ["data.reward_model=empty"], "data.reward_model", "finished reward_model run"),
    ("ppo", ["evaluation.judge=classifier"], "evaluation.judge", '"module:function", or the output_dir'),
    ("ppo", ["data.output_dir=scorer"], "data.output_dir", "another folder"),
    ("ppo", ["data.prompts=none.jsonl"], "data.prompts", "csv, tsv"),
    ("ppo", ["rollout.engine=spark"], "rollout.engine", '"local", "ray" or "vllm"'),
    ("ppo", ["rollout.workers=0"], "rollout.workers", "a whole number >= 1"),
    ("ppo", ["rollout.max_staleness=1"], "rollout.max_staleness", 'rollout.engine "ray" or "vllm"'),
    ("ppo", ["rollout.importance_cap=0.5"], "rollout.importance_cap", "a number >= 1"),
    ("ppo", ["rollout.engine=vllm", "rollout.gpus_per_worker=-1"], "rollout.gpus_per_worker", "a number >= 0"),
    (
        "ppo",
        ["rollout.engine=vllm", "generation.temperature=0.7", "generation.top_k=5"],
        "generation.temperature",
        "neither top_k nor top_p",
    ),
    ("rlhf", ["rollout.max_staleness=1"], "rollout.max_staleness", 'rollout.engine "ray" or "vllm"'),
    ("rlhf", ["data.preference_data=null"], "data.preference_data", "the rows to train on"),
    ("rlhf", ["data.preference_data=null", "data.prompts=rows.jsonl"], "data.preference_data", "the rows to train on"),
    ("rlhf", ["data.training_data=rows.jsonl"], "data.training_data", "one of the two"),
    ("rlhf", ["data.prompts=none.jsonl"], "data.prompts", "csv, tsv"),
    ("rlhf", ["data.reward_model=scorer"], "data.reward_model", "a key of data"),
    ("rlhf", ["data.streaming=true"], "data.streaming", "data.max_rows"),
    ("rlhf", ["model.num_heads=5", "model.d_model=12"], "model.d_model", "a multiple of num_heads (5)"),
    ("rlhf", ["training.momentum=0.5"], "training.momentum", "0, or optimizer sgd or muon"),
    ("rlhf", ["training.precision=fp16", "training.device=cpu"], "training.precision", "auto, fp32 or bf16"),
    ("rlhf", ["training.kl_in=loss", "training.kl_estimator=k1"], "training.kl_estimator", '"k2", "k3", or nothing'),
    ("rlhf", ["training.metric=pair_accuracy"], "training.metric", '"reward" or null'),
    ("rlhf", ["rewards.model_weight=0"], "rewards.model_weight", "other than 0"),
    ("rlhf", ["reward.model_weight=1"], "reward.model_weight", "a key of reward"),
    (
        "rlhf",
        ['reward_training={"learning_rate": 1, "metric": "reward"}'],
        "reward_training.metric",
        '"loss", "pair_accuracy", "step_accuracy"',
    ),
    (
        "rlhf",
        ['reward_training={"learning_rate": 1, "momentum": 0.5}'],
        "reward_training.momentum",
        "0, or optimizer sgd or muon",
    ),
    ("rlhf", ["reward_training={}"], "reward_training.learning_rate", "a number > 0"),
    ("rlhf", ["evaluation.judge=empty"], "evaluation.judge", '"module:function", or the output_dir'),
]


@pytest.mark.parametrize(
    ("method", "overrides", "field", "expected"), WRONG, ids=[f"{row[0]} {' '.join(row[1])}" for row in WRONG]
)
def test_each_mistake_is_one_diagnostic(
    preference_diagnostics: Faults, method: str, overrides: Sequence[str], field: str, expected: str
) -> None:
    (diagnostic,) = preference_diagnostics(method, overrides)
    assert diagnostic.field == field
    assert expected in (diagnostic.expected or diagnostic.actual)


@pytest.mark.parametrize(
    ("name", "actual", "hint"),
    [
        ("scorers", "does not exist", 'did you mean "scorer"?'),
        ("far/away", "does not exist", "train one first"),
        ("classifier", "a model of task classification", ""),
        ("talker", "a model without scores", ""),
        ("broken", "whose loopos.json cannot be read", ""),
        ("unfinished", "a run without a finished model", "loopos train CONFIG --resume"),
        ("empty", "which contains no trained model", ""),
        ("rows.jsonl", "which contains no trained model", ""),
    ],
)
def test_what_is_no_reward_model_is_reported(preference_diagnostics: Faults, name: str, actual: str, hint: str) -> None:
    (diagnostic,) = preference_diagnostics("ppo", [f"data.reward_model={name}"])
    assert actual in diagnostic.actual
    assert hint in diagnostic.hint


@pytest.mark.parametrize(
    ("method", "key", "meant"),
    [
        ("reward_model", "reward.centering", '"center_rewards"'),
        ("reward_model", "reward.center_rewards_coefficient", '"center_rewards"'),
        ("reward_model", "training.clip_epsilon", 'it belongs to the methods "ppo" and "rlhf"'),
        ("ppo", "training.clip_epsilom", '"clip_epsilon"'),
        ("ppo", "training.kl_coef", '"kl_coefficient"'),
        ("ppo", "guards.repetitions", '"repetition"'),
        ("rlhf", "data.preferences_data", '"preference_data"'),
        ("rlhf", "training.max_new_tokens", 'belongs under "generation"'),
    ],
)
def test_an_unknown_key_suggests_the_intended_one(
    preference_diagnostics: Faults, method: str, key: str, meant: str
) -> None:
    (diagnostic,) = preference_diagnostics(method, [f"{key}=1"])
    assert diagnostic.field == key
    assert meant in diagnostic.hint


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("reward_model", ["data.preference_data=null", "data.training_data=rows.jsonl"]),
        ("reward_model", ["training.trainable=head"]),
        ("reward_model", ["training.trainable=lora", "training.metric=pair_accuracy"]),
        ("reward_model", ["data.chat_template=none", "reward.heads=4", "reward.center_rewards=0.01"]),
        ("ppo", ["data.reward_model=run"]),
        ("ppo", ["data.reward_model=run/model"]),
        ("ppo", ["data.reward_model=null", "training.value_model=shared", 'reward.functions=[{"name": "a.b:c"}]']),
        ("ppo", ["reward.model_weight=0", 'reward.functions=[{"name": "a:b", "weight": -1.0}]']),
        ("ppo", ["training.kl_in=loss", "training.kl_estimator=k2", "training.kl_target=6"]),
        ("ppo", ["training.kl_estimator=k3", "training.dual_clip=3", "training.value_clip=null"]),
        ("ppo", ["data.max_length=100", "data.max_prompt_tokens=36", 'generation.stop=["END"]']),
        ("ppo", ["training.metric=reward", "training.early_stopping.patience=2", "training.save_every=100"]),
        ("ppo", ["evaluation.judge=a.b:c", "guards.judge_drop=0.5", "evaluation.best_of=[4, 16]"]),
        ("ppo", ["evaluation.judge=run"]),
        ("rlhf", ["data.prompts=rows.jsonl", "data.over_length=cut"]),
        ("rlhf", ['reward_training={"learning_rate": 0.001, "trainable": "head"}', "training.trainable=lora"]),
    ],
)
def test_what_is_no_mistake_loads(preference_diagnostics: Faults, method: str, overrides: Sequence[str]) -> None:
    assert preference_diagnostics(method, overrides) == ()


@pytest.mark.parametrize(
    ("method", "overrides", "noted"),
    [
        ("reward_model", [], []),
        ("reward_model", ["training.head_learning_rate=0.01"], []),
        ("reward_model", ['data.columns={"margin": "m"}'], ["data.columns.margin"]),
        ("reward_model", ['data.columns={"margin": "m"}', "reward.margins=true"], []),
        ("reward_model", ['data.columns={"p_human": "p"}'], []),
        ("reward_model", ['data.columns={"p_human": "p"}', "reward.soft_labels=false"], ["data.columns.p_human"]),
        ("reward_model", ["data.validation_data=./rows.jsonl"], ["data.validation_data"]),
        ("reward_model", ["training.validate_every=never"], ["training.save_every"]),
        ("reward_model", ["data.max_dropped_share=0.5", "data.over_length=cut"], ["data.max_dropped_share"]),
        ("ppo", [], []),
        ("ppo", ["training.head_learning_rate=0.1"], ["training.head_learning_rate"]),
        ("ppo", ["training.minibatches=16"], []),
        ("ppo", ["training.minibatches=17"], ["training.minibatches"]),
        ("ppo", ["generation.top_k=5"], ["generation.top_k"]),
        ("ppo", ["generation.top_p=0.9"], ["generation.top_k"]),
        ("ppo", ["generation.temperature=0.7"], ["generation.temperature"]),
        ("ppo", ["training.kl_coefficient=0", "training.kl_estimator=k3"], ["training.kl_estimator"]),
        ("ppo", ["training.kl_horizon=5"], ["training.kl_horizon"]),
        ("ppo", ["training.kl_horizon=5", "training.kl_target=6"], []),
        ("ppo", ["guards.judge_drop=0.5"], ["guards.judge_drop"]),
        ("ppo", ["guards.stop=true"], ["guards.stop"]),
        ("ppo", ["guards.stop=true", "guards.kl=30"], []),
        ("ppo", ["evaluation.prompts=0", "evaluation.best_of=[4]"], ["evaluation.best_of"]),
        ("ppo", ["evaluation.judge=./scorer"], ["evaluation.judge"]),
        ("ppo", ["rollout.workers=3", "rollout.restarts=1"], ["rollout.workers", "rollout.restarts"]),
        ("ppo", ["rollout.engine=ray", "rollout.workers=3", "rollout.max_staleness=2"], []),
        ("ppo", ["rollout.importance_cap=2", "training.old_logprobs=engine"], ["training.old_logprobs"]),
        ("rlhf", ["rollout.timeout=90s"], ["rollout.timeout"]),
        ("ppo", ["training.save_every=validation", "data.validation_share=0"], ["training.save_every"]),
        (
            "ppo",
            [
                *("data.reward_model=null", "training.value_model=policy", 'reward.functions=[{"name": "a:b"}]'),
                *("reward.ensemble_penalty=1", "reward.model_weight=2"),
            ],
            ["reward.model_weight", "reward.ensemble_penalty"],
        ),
        ("rlhf", [], []),
        ("rlhf", ["rewards.ensemble_penalty=1"], ["rewards.ensemble_penalty"]),
        ("rlhf", ["rewards.ensemble_penalty=1", "reward.heads=2"], []),
        ("rlhf", ["data.validation_data=rows.jsonl"], ["data.validation_data"]),
        ("rlhf", ["data.validation_data=scorer", "data.validation_share=0.2"], ["data.validation_share"]),
        ("rlhf", ["data.validation_data=scorer", "data.validation_share=0.2", "data.prompts=rows.jsonl"], []),
        ("rlhf", ["data.max_dropped_share=0.5", "data.over_length=cut"], []),
        ("rlhf", ["data.max_dropped_share=0.5", "data.over_length=error"], ["data.max_dropped_share"]),
        ("rlhf", ['reward_training={"learning_rate": 1e-5, "num_cycles": 2}'], ["reward_training.num_cycles"]),
        ("rlhf", ["training.num_cycles=2"], ["training.num_cycles"]),
    ],
)
def test_keys_without_effect_are_noted(
    load_preference: Loads, method: str, overrides: Sequence[str], noted: list[str]
) -> None:
    assert [note.split()[0] for note in load_preference(method, overrides).notes] == noted


@pytest.mark.parametrize(
    ("config_class", "num_definitions"), [(RewardModelConfig, 11), (PpoConfig, 16), (RlhfConfig, 20)]
)
def test_the_schema_describes_every_key(config_class: type[MethodConfig], num_definitions: int) -> None:
    described = schema(config_class)
    definitions: dict[str, dict[str, Any]] = {**described["$defs"], "top": described}
    assert len(definitions) == num_definitions
    for name, definition in definitions.items():
        assert definition["additionalProperties"] is False, name
        for key, field in definition["properties"].items():
            assert field.get("description"), f"{name}.{key}"
    assert set(described["required"]) == {"computation", "training", "data"}


def test_the_configs_import_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "import loopos.config.rlhf\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
