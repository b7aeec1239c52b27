"""Every `loopos` command that a document shows exists with its options, and runs at pico size where it can.

A page's commands run in the page's order, in a folder with small stand-ins for the models, data and configs that the
documents name.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from loopos.cli.commands import app
from tests.cli.conftest import Invoke, rows, write_jsonl

ROOT = Path(__file__).parents[2]
LAB_BOOK = "decisions.md"
# typer may carry its own copy of click.
UsageError: Any = typer.BadParameter.__bases__[0]
PAGES = [*sorted(ROOT.glob("*.md")), *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != LAB_BOOK)]

# A pattern of commands that are only parsed → why they do not run here.
ONLY_PARSED = {
    r"^loopos serve ": "serves until it is stopped; tests/serving run it",
    r"^loopos ui ": "serves until it is stopped; tests/web run it",
    r"^loopos rl check ": "needs a config of its own; tests/cli/test_rl_check.py runs it",
    r"^loopos demo": "trains a 135M model for minutes",
    r" --nproc ": "starts processes; tests/cli/test_nproc.py runs it",
    r" --tasks ": "needs the extra eval",
    r"--teacher http": "needs an endpoint; tests/cli/test_sample_command.py has one",
    r"reasoning-gym:": "needs the extra rewards",
    r"configs/tools\.json": "needs a template with tools; tests/methods/test_environment_runs.py has one",
    r"rollout\.engine=": "needs the extra cluster",
    r"meta-llama/": "needs a hub",
    r"--format (gguf|modelfile)": "needs a tokenizer that llama.cpp knows; tests/exporting have one",
}
# Commands that show a mistake → the exit code.
MISTAKES = {"loopos validate run.json training.learning_rat=1e-4": 2}
# Names of models in the documents → the stand-in: a head, a language model, a reward model, a head under LoRA.
STAND_INS = {
    "head": ("one_epoch", "messages", "tickets", "my_run", "demo/fine_tuning", "a", "b", "c", "intents"),
    "language": (
        "chat",
        "chain_of_thought",
        "reasoning",
        "reasoner_a",
        "reasoner_b",
        "pretraining",
        "ppo",
        "replies",
        "rlhf",
        "orpo",
    ),
    "dpo": ("dpo",),
    "reward": ("judge", "my_reward_model", "rlhf_reward"),
    "lora": ("lora_run",),
}
# What makes a training short, by config. The guide's configs have a new model of 6 layers.
NEW_MODEL = ("model.d_model=32", "model.num_heads=4", "model.d_ff=64", "model.num_layers=2", "model.vocab_size=300")
SHORT = ("training.max_steps=2", "training.device=cpu", "training.precision=fp32")
SHORTER = {
    "configs/pretraining.json": (*NEW_MODEL, *SHORT, "training.max_length=32"),
    "configs/chain_of_thought.json": (*SHORT, "evaluation.problems=2", "generation.max_new_tokens=4"),
    "configs/distillation.json": (*SHORT, "online.max_new_tokens=4"),
    "configs/rlhf.json": ("training.max_iterations=1", "training.device=cpu", "generation.max_new_tokens=4"),
}
PROBLEMS = [
    {"problem": f"What is {i} + {i}?", "reasoning": [f"{i} + {i} = {2 * i}"], "answer": str(2 * i)} for i in range(4)
]
COMPARISONS = [
    {"prompt": f"where is my parcel {i}", "chosen": "thank you, it comes", "rejected": "just wait"} for i in range(12)
]
STEPS = [
    {"prompt": f"What is {i} + {i}?", "completions": [f"{i} + {i} = {2 * i}", "so 7"], "labels": [True, i % 2 == 0]}
    for i in range(12)
]
TEXT = "\n\n".join(f"{row['text']} and {row['label']} again" for row in rows(60))
JUDGE = "def polite(prompt, first, second):\n    return first.count('e'), second.count('e')\n"


def fenced(text: str) -> Iterator[tuple[str, list[str]]]:
    """Language and lines of each fenced block."""
    language, block = None, []
    for line in text.splitlines():
        if line.startswith("```"):
            if language is not None:
                yield language, block
            language, block = (line[3:].strip(), []) if language is None else (None, [])
        elif language is not None:
            block.append(line)


def shown(page: Path) -> list[str]:
    """The lines of a page's shell blocks that call loopos, without prompt and comment."""
    lines = [line for language, block in fenced(page.read_text(encoding="utf-8")) if language == "" for line in block]
    found = [re.sub(r"^\$ ", "", re.sub(r"\s{2,}#.*$| # .*$", "", line)).strip() for line in lines]
    return [line for line in found if line.startswith("loopos ") or "| loopos " in line]


def named(page: Path) -> list[str]:
    """Commands inside the text, such as `loopos train CONFIG --resume`; not those with an ellipsis."""
    spans = re.findall(r"`(loopos [a-z][^`\n]*)`", page.read_text(encoding="utf-8"))
    return [span for span in spans if not re.search(r"…|\.\.\.|\||\[|^loopos \w+( \w+)?$", span)]


def arguments_of(line: str) -> list[str]:
    return shlex.split(line.rpartition("| ")[2])[1:]


def parse(arguments: list[str]) -> None:
    """Raises a click error unless the command exists and accepts the arguments."""
    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="loopos")
    while hasattr(command, "commands"):
        name, command, arguments = command.resolve_command(context, arguments)
        context = typer.Context(command, info_name=name, parent=context)
    command.make_context(context.info_name, list(arguments), parent=context.parent)


def reason(line: str) -> str | None:
    """Why a command is only parsed; None if it runs."""
    return next((why for pattern, why in ONLY_PARSED.items() if re.search(pattern, line)), None)


ALL = [(page, line) for page in PAGES for line in shown(page)]


def runnable() -> dict[Path, list[str]]:
    """The commands that run, by page; one that several pages show runs on the page of its subject."""
    found: dict[Path, list[str]] = {}
    known: set[str] = set()
    for page in sorted(PAGES, key=lambda page: page.name in ("README.md", "cli.md", "index.md")):
        found[page] = list(dict.fromkeys(line for line in shown(page) if reason(line) is None and line not in known))
        known |= set(found[page])
    return found


RUN = runnable()
# Their commands take seconds each: they change a model, or train one after the other. Tests of the commands themselves
# are quick, and that all of them exist with their options is tested for every page.
_SLOW_PAGES = (
    "README.md",
    "chain_of_thought.md",
    "distillation.md",
    "ensembles.md",
    "evaluation.md",
    "post_training.md",
    "pruning.md",
    "quantization.md",
)
RUN_PAGES = [
    pytest.param(page, marks=pytest.mark.slow) if page.name in _SLOW_PAGES else page for page in PAGES if RUN[page]
]


def test_the_counts_of_shown_commands() -> None:
    run, different = sum(len(lines) for lines in RUN.values()), len({line for _, line in ALL})
    print(f"{len(ALL)} commands shown, {different} different, {run} run, {different - run} only parsed")
    assert different >= 70
    assert run >= 55
    assert len([name for page in PAGES for name in named(page)]) >= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_exists_with_its_options(page: Path) -> None:
    for line in [*shown(page), *named(page)]:
        try:
            parse(arguments_of(line))
        except UsageError as error:
            # Inside a sentence a command may leave out what it does not speak of.
            is_partial = line in named(page) and type(error).__name__ in ("MissingParameter", "BadOptionUsage")
            if not is_partial:
                pytest.fail(f"{page.name}: {line}: {error.format_message()}")


@pytest.mark.parametrize("line", ["loopos trian my.json", "loopos train my.json --fast", "loopos winrate a b"])
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    with pytest.raises(UsageError):
        parse(arguments_of(line))


@pytest.fixture(scope="session")
def models(trained: Any, project: Path, language_run: Path, pico_folder: Path, invoke: Invoke) -> dict[str, Path]:
    """The stand-ins, each a real run or folder of the pico model."""
    assert trained.exit_code == 0
    folder = project / "stand_ins"
    folder.mkdir()
    config = json.loads((project / "run.json").read_text(encoding="utf-8"))
    config["training"] |= {"trainable": "lora", "num_epochs": 1}
    config["data"]["output_dir"] = str(folder / "lora")
    write_jsonl(folder / "comparisons.jsonl", COMPARISONS)
    reward = {
        "computation": {"mode": "posttraining", "method": "reward_model"},
        "training": {**config["training"], "trainable": "all"},
        "data": {
            "pretrained_weights": str(pico_folder),
            "preference_data": str(folder / "comparisons.jsonl"),
            "output_dir": str(folder / "reward"),
        },
    }
    preference = reward | {
        "computation": {"mode": "posttraining", "method": "dpo"},
        "data": reward["data"] | {"output_dir": str(folder / "dpo")},
    }
    for name, content in (("lora", config), ("reward", reward), ("dpo", preference)):
        file = folder / f"{name}.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        result = invoke("train", file, "--quiet")
        assert result.exit_code == 0, result.stderr
    return {
        "head": project / "outputs" / "first",
        "language": language_run,
        "reward": folder / "reward",
        "lora": folder / "lora",
        "dpo": folder / "dpo",
        "pico": pico_folder,
    }


@pytest.fixture
def world(models: dict[str, Path], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the documents' names mean something; it is the current directory."""
    for kind, names in STAND_INS.items():
        for name in names:
            target = tmp_path / "outputs" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(models[kind], target)
    # The reward model of an rlhf run is inside it.
    shutil.move(tmp_path / "outputs" / "rlhf_reward", tmp_path / "outputs" / "rlhf" / "reward_model")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    distillation = tmp_path / "configs" / "distillation.json"
    written = distillation.read_text(encoding="utf-8").replace("smollm2-135m", str(models["pico"]))
    distillation.write_text(written, encoding="utf-8")
    (tmp_path / "data").mkdir()
    labeled, prompts = rows(24), [{"prompt": row["prompt"]} for row in COMPARISONS]
    for name in ("messages.jsonl", "test.jsonl", "data/test.jsonl", "data/validation.jsonl"):
        write_jsonl(tmp_path / name, labeled)
    for name in ("messages.csv", "test.csv"):
        lines = [f"{row['text']},{row['label']}\n" for row in labeled]
        (tmp_path / name).write_text("text,label\n" + "".join(lines), encoding="utf-8")
    for name in ("comparisons.jsonl", "data/comparisons.jsonl", "preferences.jsonl", "prefs.jsonl"):
        write_jsonl(tmp_path / name, COMPARISONS)
    for name in ("prompts.jsonl", "data/prompts.jsonl"):
        write_jsonl(tmp_path / name, prompts)
    for name in ("old", "new"):
        answers = [{"prompt": row["prompt"], "completion": f"{name} answer {n}"} for n, row in enumerate(prompts)]
        write_jsonl(tmp_path / f"{name}.jsonl", answers)
    write_jsonl(tmp_path / "problems.jsonl", PROBLEMS)
    write_jsonl(tmp_path / "steps.jsonl", STEPS)
    shutil.copy(project / "stand_ins" / "reward.json", tmp_path)
    chats = [
        {
            "messages": [
                {"role": role, "content": row[key]} for role, key in (("user", "prompt"), ("assistant", "chosen"))
            ]
        }
        for row in COMPARISONS
    ]
    write_jsonl(tmp_path / "chats.jsonl", chats)
    worked = "\n\n".join(
        f"Problem: {row['problem']}\n{row['reasoning'][0]}\nAnswer: {row['answer']}" for row in PROBLEMS
    )
    (tmp_path / "data" / "reasoning_examples.txt").write_text(worked, encoding="utf-8")
    for name in ("held_out.txt", "text.txt", "my_text.txt", "data/pretraining.txt"):
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    for name in ("prompts.txt", "questions.txt"):
        (tmp_path / name).write_text("where is my parcel\nwhy so late\n", encoding="utf-8")
    (tmp_path / "my_judges.py").write_text(JUDGE, encoding="utf-8")
    config = json.loads((project / "run.json").read_text(encoding="utf-8"))
    config["training"]["num_epochs"] = 1
    for name in ("my", "run", "recover"):
        config["data"]["output_dir"] = f"outputs/of_{name}"
        (tmp_path / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def with_configs_of(page: Path, folder: Path, pico: Path) -> None:
    """Writes the configs and recipes that a page shows: a JSON block under the name that its commands use."""
    blocks = ["\n".join(block) for language, block in fenced(page.read_text(encoding="utf-8")) if language == "json"]
    for text in blocks:
        try:
            content = json.loads(text.replace("smollm2-135m", str(pico)))
        except json.JSONDecodeError:
            continue
        if not isinstance(content, dict):
            continue
        if content.get("method"):
            (folder / "recipe.json").write_text(json.dumps(content), encoding="utf-8")
        elif content.get("computation", {}).get("method") == "sft":
            (folder / "chat.json").write_text(json.dumps(content), encoding="utf-8")


def shortened(arguments: list[str]) -> list[str]:
    """The same command with fewer steps and tokens."""
    command, rest = arguments[0], arguments[1:]
    if command == "train":
        sizes = NEW_MODEL if rest[0] == "configs/chain_of_thought.json" and "model={}" not in rest else ()
        return [*arguments, *sizes, *SHORTER.get(rest[0], SHORT)]
    if command in ("generate", "winrate") and "--max-new-tokens" not in rest:
        return [*arguments, "--max-new-tokens", "4", "--device", "cpu"]
    if command == "sample":
        # So few tokens never end by themselves.
        scored = ["--allow-cut"] if "--judge" in rest or "--judge-model" in rest else []
        return [*arguments, "--max-new-tokens", "4", *scored, "--device", "cpu"]
    if command == "evaluate" and any(word in rest for word in ("--strategy", "--samples")):
        return [*arguments, "--max-new-tokens", "4", "--limit", "2"]
    if command == "evaluate" and "--window" in rest:
        return [*arguments, "--window", "64", "--stride", "32"]
    if command in ("prune", "quantize") and not rest[0].endswith("recipe.json"):
        # The pico model has two layers.
        half = ["--sparsity", "0.5"] if "layers" in rest else []
        return [*arguments, "--calibration-rows", "2", "--calibration-tokens", "32", "--window", "32", *half]
    return arguments


def without_its_run(arguments: list[str]) -> None:
    """Removes the stand-in at the output folder of a training that begins."""
    if arguments[0] == "train" and not {"--resume", "--dry-run"} & set(arguments):
        config = json.loads(Path(arguments[1]).read_text(encoding="utf-8"))
        shutil.rmtree(config["data"].get("output_dir", "nowhere"), ignore_errors=True)


@pytest.mark.usefixtures("few_goes")
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, world: Path, models: dict[str, Path], invoke: Invoke) -> None:
    for shown_on in (ROOT / "docs" / "chain_of_thought.md", page):
        with_configs_of(shown_on, world, models["pico"])
    for line in RUN[page]:
        arguments = [word.replace("smollm2-135m", str(models["pico"])) for word in arguments_of(line)]
        text = line.partition(" | ")[0].removeprefix("echo ").strip('"') if " | " in line else "hello\n"
        if arguments[:2] == ["study", "vote"]:
            text = "1\n2\n1\n2\n1\n"
        without_its_run(arguments)
        result = invoke(*shortened(arguments), text=text)
        output = f"{page.name}: {line}\n{result.stdout[-500:]}\n{result.stderr[-1500:]}"
        assert result.exit_code == MISTAKES.get(line, 0), output
        if line in MISTAKES:
            assert result.stderr.strip() in page.read_text(encoding="utf-8"), output
