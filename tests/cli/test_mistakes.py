"""Common mistakes of users: the message, its length, the exit code, and no import of torch.

The quick ones run one after another in a process of their own, which must not have imported torch at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loopos.planning import dry_run, machine
from tests.cli.conftest import Invoke, write_jsonl

MOST_LINES = 12
TEXT, LABEL = "Issue description (free text)", "Cat. lvl-1"
COLUMNS = f"Columns: 'Ticket', '{TEXT}', '{LABEL}'"
ACTUAL_COLUMNS = f"data.columns={json.dumps({'text': TEXT, 'label': LABEL})}"
MODEL = {
    "format": 1,
    "task": "classification",
    "pooling": "mean",
    "max_length": 64,
    "precision": "fp32",
    "class_names": ["bad", "good"],
    "label_space": {
        "task": "classification",
        "class_names": ["bad", "good"],
        "keys": ["bad", "good"],
        "label_kind": "text",
        "num_outputs": 2,
        "said": "2 classes",
    },
    "threshold": 0.5,
    "target_mean": 0.0,
    "target_std": 1.0,
}
JUDGE = {"task": "reward", "score_mean": [0.0], "score_std": [1.0], "text": False}

NEW = {
    "model": {"d_model": 32, "num_heads": 2, "num_layers": 2, "d_ff": 64, "vocab_size": 300},
    "computation": {"mode": "pretraining", "method": "autoregressive"},
    "training": {"learning_rate": 1e-3},
    "data": {"input_file": "words.txt", "output_dir": "out"},
}
AXOLOTL = """\
base_model: org/small
datasets:
  - path: org/chats
    type: chat_template
val_set_size: 0.05
output_dir: ./outputs/lora-out
adapter: lora
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true
gradient_accumulation_steps: 2
micro_batch_size: 4
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
wandb_project:
flash_attention: true
"""
LLAMA_FACTORY = """\
model_name_or_path: org/small
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity
template: llama3
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
output_dir: saves/sft
"""
TRL = """\
model_name_or_path: org/small
dataset_name: org/chats
learning_rate: 2.0e-5
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
use_peft: true
lora_r: 32
lora_alpha: 16
max_length: 1024
output_dir: out
"""
TRANSLATED = {
    "axolotl.yaml": {
        "computation": {"mode": "posttraining", "method": "sft"},
        "training": {
            "learning_rate": 0.0002, "trainable": "lora", "max_length": 2048,
            "lora": {"rank": 16, "alpha": 32, "target_modules": "all-linear"}, "gradient_accumulation": 2,
            "batch_size": 4, "num_epochs": 3, "optimizer": "adamw", "schedule": "cosine", "precision": "auto",
        },
        "data": {
            "pretrained_weights": "org/small", "training_data": "org/chats", "output_dir": "./outputs/lora-out",
            "validation_share": 0.05,
        },
    },
    "factory.yaml": {
        "computation": {"mode": "posttraining", "method": "sft"},
        "training": {
            "learning_rate": 1e-4, "trainable": "lora", "lora": {"rank": 8, "target_modules": "all-linear"},
            "max_length": 2048, "batch_size": 1, "gradient_accumulation": 8, "num_epochs": 3, "schedule": "cosine",
            "warmup": 0.1,
        },
        "data": {
            "pretrained_weights": "org/small", "training_data": "data/identity.json", "output_dir": "saves/sft",
        },
    },
    "trl.yaml": {
        "computation": {"mode": "posttraining", "method": "sft"},
        "training": {
            "learning_rate": 2e-5, "num_epochs": 1, "batch_size": 2, "gradient_accumulation": 8,
            "trainable": "lora", "lora": {"rank": 32, "alpha": 16}, "max_length": 1024,
        },
        "data": {"pretrained_weights": "org/small", "training_data": "org/chats", "output_dir": "out"},
    },
}  # fmt: skip

NO_TEXT = (f"data.columns.text: no text column found. {COLUMNS}", f'choose one: data.columns: {{"text": "{TEXT}"}}')
NO_LABEL = (f"data.columns.label: no label column found. {COLUMNS}",)
WRONG = 'data.columns={"text": "Issue", "label": "cat"}'
WRONG_SAID = (f'did you mean "{TEXT}"? set: data.columns: {{"text": "{TEXT}"}}', f'did you mean "{LABEL}"?')
OPTION = f'choose one: --columns "text={TEXT}"'

STRAY_SAID = (
    "stray.csv:3: Cat. lvl-1: got 'Praise'; expected one of the 2 classes Billing, Delivery\n",
    'correct these labels, or leave them out: data.on_bad_row: "skip"',
)
CHATS_SAID = (
    "bad_chats.jsonl:4:24: JSON: got '\"us' (Unterminated string starting at); expected valid JSON",
    "bad_chats.jsonl:2: messages[1].role: got 'bot'; expected one of human, user, gpt,",
    "bad_chats.jsonl:3: messages: no assistant message: nothing to learn (roles: user)",
    'correct the rows, or leave them out: data.on_bad_row: "skip"',
)
SAME_SAID = ("pairs.jsonl:2: rejected: chosen and rejected are identical ('b')", 'data.on_bad_row: "skip"')

# (name, words, exit code, what must be said)
QUICK: list[tuple[str, list[str], int, tuple[str, ...]]] = [
    ("no such config", ["train", "nowhere-at-all.json"], 2, ("a path that does not exist", "configs in .: axolotl.yaml, ")),
    ("wrong path", ["train", "run.json", "data.training_data=tickts.csv"], 2, ('did you mean "tickets.csv"?',)),
    ("columns", ["train", "run.json"], 2, (*NO_TEXT, *NO_LABEL)),
    ("columns, dry run", ["train", "run.json", "--dry-run"], 2, (*NO_TEXT, *NO_LABEL)),
    ("columns, validate", ["validate", "run.json"], 2, (*NO_TEXT, *NO_LABEL)),
    ("columns, preview", ["data", "preview", "run.json"], 2, (*NO_TEXT, *NO_LABEL)),
    ("columns, json", ["validate", "run.json", "--json"], 2, ('"field": "data.columns.text"',)),
    ("columns, check", ["data", "check", "tickets.csv"], 2, ("no text column found", OPTION)),
    ("columns, predict", ["predict", "trained", "tickets.csv"], 2, ("--columns: no text column found", OPTION)),
    ("columns, evaluate", ["evaluate", "trained", "tickets.csv"], 2, ("no label column found", OPTION)),
    ("columns, score", ["score", "judge", "tickets.csv"], 2, ("no known format", "--columns prompt=COLUMN --columns response=COLUMN")),
    ("columns, sft", ["validate", "run.json", "computation.method=sft"], 2, ("these columns make no known format",)),
    ("wrong columns", ["train", "run.json", WRONG], 2, WRONG_SAID),
    ("wrong columns, dry run", ["train", "run.json", WRONG, "--dry-run"], 2, WRONG_SAID),
    ("wrong column, predict", ["predict", "trained", "tickets.csv", "--columns", "text=Issue"], 2,
     (f'did you mean "{TEXT}"? set: --columns "text={TEXT}"',)),
    ("quoted number", ["validate", "run.json", 'training.learning_rate="5e-5"'], 2, ("write 5e-5, without quotes",)),
    ("a word for a number", ["validate", "run.json", 'training.learning_rate="fast"'], 2, ("a number > 0",)),
    ("another size", ["train", "run.json", "data.pretrained_weights=smollm2-360m"], 2, ('mean "smollm2-135m"?',)),
    ("keys of TRL", ["validate", "run.json", "training.lr=1", "training.num_train_epochs=3"], 2,
     ('did you mean "learning_rate"?', 'did you mean "num_epochs"?')),
    ("key at the top", ["validate", "run.json", "learning_rate=1e-4"], 2, ('it belongs under "training"',)),
    ("trailing comma", ["validate", "comma.json"], 2, ("remove the comma",)),
    ("duplicate key", ["validate", "repeated.json"], 2, ("repeated.json:1", "it is also in line 1")),
    ("broken YAML", ["validate", "broken.yaml"], 2, ("not valid YAML: ",)),
    ("config of Axolotl", ["train", "axolotl.yaml"], 2,
     ("a config of Axolotl", "base_model → data.pretrained_weights", "micro_batch_size → training.batch_size",
      "without counterpart: sample_packing, flash_attention")),
    ("config of LLaMA-Factory", ["validate", "factory.yaml"], 2,
     ("a config of LLaMA-Factory", "finetuning_type → training.trainable", "without counterpart: do_train, template")),
    ("config of TRL", ["validate", "trl.yaml"], 2, ("a config of TRL", "use_peft → training.trainable")),
    ("method online_dpo", ["validate", "run.json", "computation.method=online_dpo"], 2,
     ('it is "dpo" here, with the section "online"',)),
    ("method xpo", ["validate", "run.json", "computation.method=xpo"], 2,
     ('XPO is not available; learn from preferences with "dpo", or with "rlhf"',)),
    ("method preference", ["validate", "run.json", "computation.method=preference"], 2, ('it is "dpo" here',)),
    ("method grpo without a reward", ["validate", "run.json", "computation.method=grpo"], 2, ("got no reward", "or functions")),
    ("method classification", ["validate", "run.json", "computation.method=classification"], 2,
     ('it is "fine_tuning" here',)),
    ("method rm", ["validate", "run.json", "computation.method=rm"], 2, ('it is "reward_model" here',)),
    ("method pt", ["validate", "run.json", "computation.method=pt"], 2, ('"autoregressive"', '"mode": "pretraining"')),
    ("method lora", ["validate", "run.json", "computation.method=lora"], 2, ('"trainable": "lora"',)),
    ("sft", ["validate", "chats.json"], 0, ("valid (posttraining, sft)",)),
    ("steps under sft", ["validate", "chats.json", "data.step_format=hashes", "self_improvement.rounds=1"], 2,
     ('the unknown key "step_format"', 'it belongs to the method "chain_of_thought"')),
    ("SFT", ["validate", "chats.json", "computation.method=SFTTrainer"], 2, ('write "sft"',)),
    ("cuda on a CPU", ["train", "text.json", "training.device=cuda"], 2, ("training.device: got cuda",)),
    ("fp16 on a CPU", ["train", "text.json", "training.precision=fp16"], 2, ("training.precision: got fp16",)),
    ("data as config", ["train", "tickets.csv"], 2,
     ("tickets.csv: this is a data file, not a config", '"training_data": "tickets.csv"')),
    ("rows as config", ["train", "rows.json"], 2, ("rows.json: this is a data file, not a config",)),
    ("chats as config", ["train", "chats.jsonl"], 2, ("this is a data file", '"method": "sft"')),
    ("no such command", ["trian", "run.json"], 2, ("Did you mean 'train'?",)),
    ("no such option", ["train", "run.json", "--resum"], 2, ("(Possible options: --resume)",)),
    ("a key as option", ["train", "run.json", "--lr", "1e-4", "--epochs=3"], 2,
     ("no option --lr, --epochs", "write training.learning_rate=1e-4 training.num_epochs=3")),
    ("a dotted key as option", ["validate", "run.json", "--training.learning_rate=1e-4"], 2,
     ("write training.learning_rate=1e-4",)),
    ("no equals sign", ["train", "run.json", "key", "value"], 2, ('"key", without =',)),
    ("unwritable run", ["train", "text.json", "data.output_dir=/proc/x"], 2, ("/proc is not writable",)),
    ("unwritable answers", ["predict", "trained", "rows.json", "-o", "/proc/x.csv"], 2, ("/proc is not writable",)),
    ("unwritable export", ["export", "trained", "--format", "huggingface", "-o", "/proc/x"], 2, ("/proc",)),
    ("predict with a base model", ["predict", "smollm2-135m", "tickets.csv"], 2, ("a base model without a trained head",)),
    ("a classifier for chat", ["chat", "trained"], 2, ("a classifier or regressor; it cannot generate text",)),
    ("a newer format", ["predict", "newer", "tickets.csv"], 2, ("another version; upgrade loopos: pip install",)),
    ("no home of that user", ["validate", "text.json", "data.output_dir=~no-such-user/x"], 2, ("unknown user",)),
    ("4 samples at 0", ["generate", "smollm2-135m", "-p", "a", "-n", "4"], 2, ("temperature",)),
    ("an open address", ["serve", "trained", "--host", "0.0.0.0"], 2, ("--host", "API key")),
    ("a rate that destroys", ["validate", "text.json", "training.learning_rate=1e6"], 0,
     ("note: training.learning_rate 1e+06 is far above the usual range for full training of a model with adamw",)),
    ("label of no class", ["train", "stray.json"], 2, STRAY_SAID),
    ("label of no class, dry run", ["train", "stray.json", "--dry-run"], 2, STRAY_SAID),
    ("label of no class, validate", ["validate", "stray.json"], 2, STRAY_SAID),
    ("label of no class, json", ["validate", "stray.json", "--json"], 2, ('"source": "stray.csv"', '"line": 3')),
    ("label of no class, several processes", ["train", "stray.json", "--nproc", "2"], 2, STRAY_SAID),
    ("too few classes", ["train", "text.json", "model.num_classes=1"], 2,
     ("tickets.csv: model.num_classes: got 2 different labels ('Billing': 30, 'Delivery': 30); expected 1 class",)),
    ("rows without text", ["train", "empty.json"], 2, ("empty.jsonl:2: text: ", 'data.on_bad_row: "skip"')),
    ("bad chats", ["train", "bad_chats.json"], 2, CHATS_SAID),
    ("bad chats, dry run", ["train", "bad_chats.json", "--dry-run"], 2, CHATS_SAID),
    ("bad chats, validate", ["validate", "bad_chats.json"], 2, CHATS_SAID),
    ("bad chats to validate on", ["train", "chats.json", "data.validation_data=bad_chats.jsonl"], 2, CHATS_SAID),
    ("chosen is rejected", ["train", "pairs.json"], 2, SAME_SAID),
    ("chosen is rejected, rlhf", ["train", "rlhf.json", "--dry-run"], 2, SAME_SAID),
    ("chosen is rejected, rlhf, validate", ["validate", "rlhf.json"], 2, SAME_SAID),
    ("bad prompts", ["validate", "rlhf.json", "data.preference_data=good_pairs.jsonl", "data.prompts=no_prompt.jsonl"], 2,
     ("no_prompt.jsonl:2: prompt: ",)),
    ("a text of no words", ["validate", "new.json", "data.input_file=blank.txt"], 2, ("blank.txt", "text")),
    ("a text of no words to validate on", ["train", "new.json", "data.validation_data=blank.txt"], 2, ("blank.txt",)),
    ("a text to train on", ["validate", "new.json"], 0, ("valid (pretraining, autoregressive)",)),
    ("the methods", ["train", "--help"], 0, ("sft               supervised fine-tuning on chats",)),
]  # fmt: skip

IN_ONE_PROCESS = """
import json, sys
from typer.testing import CliRunner
from loopos.cli.commands import app
for name, words in json.load(sys.stdin):
    done = CliRunner().invoke(app, words)
    told = None if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
    heavy = sorted({"torch", "transformers", "datasets"} & set(sys.modules))
    print(json.dumps([name, done.exit_code, done.stdout + done.stderr, told, heavy]))
"""


def config(**data: object) -> dict[str, Any]:
    return {
        "computation": {"mode": "posttraining", "method": "fine_tuning"},
        "training": {"learning_rate": 1e-5},
        "data": {"pretrained_weights": "smollm2-135m", "training_data": "tickets.csv", "output_dir": "out", **data},
    }


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a new user has it: tickets in a table, a first config, and what else the mistakes need."""
    folder = tmp_path_factory.mktemp("desk")
    kinds = ("Billing", "Delivery")
    lines = [f"{number},I was charged twice for order {number},{kinds[number % 2]}" for number in range(60)]
    (folder / "tickets.csv").write_text("\n".join([f"Ticket,{TEXT},{LABEL}", *lines]) + "\n", encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps([{"text": "a", "label": "b"}]), encoding="utf-8")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    write_jsonl(folder / "chats.jsonl", [{"messages": chat}, {"messages": [*chat, *chat]}])
    _write_faulty_rows(folder, chat)
    contents = {
        "run.json": json.dumps(config(), indent=2),
        "text.json": json.dumps(config(columns={"text": TEXT, "label": LABEL}), indent=2),
        "chats.json": json.dumps(config(training_data="chats.jsonl")).replace("fine_tuning", "sft"),
        "stray.json": json.dumps(config(columns={"text": TEXT, "label": LABEL}, validation_data="stray.csv")),
        "empty.json": json.dumps(config(training_data="empty.jsonl")),
        "bad_chats.json": json.dumps(config(training_data="bad_chats.jsonl")).replace("fine_tuning", "sft"),
        "pairs.json": json.dumps(config(training_data="pairs.jsonl")).replace("fine_tuning", "reward_model"),
        "rlhf.json": json.dumps(config(training_data=None, preference_data="pairs.jsonl")).replace(
            "fine_tuning", "rlhf"
        ),
        "new.json": json.dumps(NEW),
        "comma.json": json.dumps(config()).replace("1e-05}", "1e-05,}"),
        "repeated.json": json.dumps(config()).replace('"training":', '"training": {}, "training":'),
        "broken.yaml": "data: {training_data: [tickets.csv\n",
        "axolotl.yaml": AXOLOTL,
        "factory.yaml": LLAMA_FACTORY,
        "trl.yaml": TRL,
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    for name, change in (("trained", {}), ("newer", {"format": 2}), ("judge", JUDGE)):
        (folder / name / "model").mkdir(parents=True)
        (folder / name / "model" / "loopos.json").write_text(json.dumps(MODEL | change), encoding="utf-8")
    return folder


def _write_faulty_rows(folder: Path, chat: list[dict[str, str]]) -> None:
    (folder / "words.txt").write_text("one\n\ntwo\n\nthree\n", encoding="utf-8")
    (folder / "blank.txt").write_text("\n \n\n", encoding="utf-8")
    (folder / "stray.csv").write_text(f"{TEXT},{LABEL}\nwell,Billing\nthanks,Praise\n", encoding="utf-8")
    write_jsonl(folder / "empty.jsonl", [{"text": "a", "label": "b"}, {"text": " ", "label": "c"}])
    asked = chat[0]
    bad = [{"messages": chat}, {"messages": [asked, {"role": "bot", "content": "x"}]}, {"messages": [asked]}]
    with write_jsonl(folder / "bad_chats.jsonl", bad).open("a", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "us')
    pairs = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "b", "rejected": "b"}]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "good_pairs.jsonl", [{**pairs[0], "prompt": f"p {number}"} for number in range(4)])
    write_jsonl(folder / "no_prompt.jsonl", [{"prompt": "p"}, {"prompt": ""}])


@pytest.fixture(scope="module")
def quick(desk: Path) -> dict[str, tuple[int, str, str | None, list[str]]]:
    """Each quick mistake by name: exit code, text, exception, heavy packages that are imported by then."""
    words = json.dumps([(name, arguments) for name, arguments, _, _ in QUICK])
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS], input=words, cwd=desk, capture_output=True, text=True, check=True
    )
    return {
        name: (code, text, told, heavy) for name, code, text, told, heavy in map(json.loads, done.stdout.splitlines())
    }


@pytest.mark.parametrize(("name", "words", "code", "summary"), QUICK, ids=[row[0] for row in QUICK])
def test_a_mistake_is_reported_at_once(
    quick: dict[str, tuple[int, str, str | None, list[str]]],
    name: str,
    words: list[str],
    code: int,
    summary: tuple[str],
) -> None:
    found_code, text, exception, heavy = quick[name]
    assert exception is None, exception
    assert found_code == code, text
    for piece in summary:
        assert piece in text, text
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) <= MOST_LINES or words[-1] in ("--help", "--json"), text
    assert heavy == [], f"{name}: {heavy} imported"


@pytest.mark.parametrize("name", sorted(TRANSLATED))
def test_a_foreign_config_is_printed_as_one_that_is_valid(
    desk: Path, invoke: Invoke, name: str, tmp_path: Path
) -> None:
    summary = invoke("validate", desk / name).stderr
    pasted = summary[summary.index("\n{") : summary.index("\n}") + 2]
    assert json.loads(pasted) == TRANSLATED[name]
    (tmp_path / "pasted.json").write_text(pasted, encoding="utf-8")
    # The hub is not there: all else of it is valid.
    again = invoke("validate", tmp_path / "pasted.json", f"data.training_data={desk / 'chats.jsonl'}")
    assert again.exit_code == 0, again.stderr


def test_a_hub_that_cannot_be_reached_is_one_try(desk: Path) -> None:
    """Nothing listens at port 9: the libraries would try it for a minute."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(desk / "hf"),
    }
    script = IN_ONE_PROCESS.replace("json.load(sys.stdin)", "json.loads(sys.argv[1])")
    cases = [
        (["train", "text.json", "data.pretrained_weights=org/name"], "data.pretrained_weights: org/name is neither"),
        (["train", "text.json", "data.tokenizer=org/name"], "data.tokenizer: org/name is neither"),
        (["train", "run.json", "data.training_data=org/rows"], "data.training_data: org/rows is neither"),
        (["generate", "org/name", "-p", "hi"], "org/name is neither"),
        (["evaluate", "org/name", "chats.jsonl"], "org/name is neither"),
    ]
    words = json.dumps([(str(number), arguments) for number, (arguments, _) in enumerate(cases)])
    done = subprocess.run(
        [sys.executable, "-c", script, words], cwd=desk, env=environment, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    for (_, summary), line in zip(cases, done.stdout.splitlines(), strict=True):
        _, code, text, exception, heavy = json.loads(line)
        assert (code, exception, heavy) == (2, None, []), line
        assert text.startswith(summary), text
        assert "http://127.0.0.1:9 cannot be reached" in text
        assert len(text.strip().splitlines()) == 2


def test_a_dry_run_that_does_not_fit_says_so_and_ends_with_3(
    project: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "measured_rates", lambda device, half: (1e9, 1e9))
    fits = invoke("train", project / "run.json", "--dry-run")
    assert (fits.exit_code, fits.stdout.splitlines()[-1]) == (0, "verdict   fits")
    monkeypatch.setattr(machine, "_memory_of", lambda device: 1_000_000)
    refused = invoke("train", project / "run.json", "--dry-run")
    assert refused.exit_code == dry_run.DOES_NOT_FIT == 3
    assert "does not fit: needs " in refused.stdout
    assert " more memory" in refused.stdout
    assert invoke("train", project / "run.json", "--dry-run", "--json").exit_code == 3


def test_a_label_of_no_class_names_the_command_s_option(
    trained: Any, project: Path, invoke: Invoke, tmp_path: Path
) -> None:
    rows = [{"text": "good the parcel", "label": "good"}, {"text": "well", "label": "Praise"}]
    result = invoke("evaluate", project / "outputs" / "first", write_jsonl(tmp_path / "rows.jsonl", rows))
    assert result.exit_code == 2
    assert "rows.jsonl:2: label: got 'Praise'; expected one of the 3 classes" in result.stderr
    assert result.stderr.splitlines()[-1] == "correct these labels, or leave them out: --skip-bad-rows"


def test_bad_rows_name_the_key_where_there_is_a_config(project: Path, invoke: Invoke, tmp_path: Path) -> None:
    rows = [{"text": "good the parcel", "label": "good"}, {"text": "", "label": "bad"}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    result = invoke("data", "preview", project / "run.json", f"data.training_data={data}")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == 'correct the rows, or leave them out: data.on_bad_row: "skip"'


def test_predict_leaves_no_row_out_and_so_names_no_option(
    trained: Any, project: Path, invoke: Invoke, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "good the parcel"}, {"text": ""}])
    result = invoke("predict", project / "outputs" / "first", data)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "correct the rows"
