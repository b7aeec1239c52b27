"""Every Python block of the README and of docs runs, in order, on small stand-ins for the models and files that it names.

A page is one program: its blocks share a namespace and a folder. A block that cannot run here stands under the line
`<!-- no-run: the reason -->`, which is no excuse for one that could.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pico_runs import FILLERS, save_pico, slow_but, write_jsonl

import loopos
from loopos.config.methods import METHODS
from loopos.evaluation.reasoning import Reasoner
from loopos.models.folders import save_language_model
from loopos.models.load import load_pretrained
from loopos.serving.language import LanguageService
from loopos.serving.limits import ServingLimits
from loopos.serving.metrics import ServingMetrics
from tests.serving.conftest import Server, served

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"^(?P<mark><!-- no-run:(?P<reason>[^>]*)-->\n+)?```python[^\n]*\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
HEAD, LANGUAGE = "head", "language"
# What a folder of a page stands for, where an earlier block of the page has not made it.
STAND_INS = {
    "outputs/my_run": HEAD,
    "outputs/a": HEAD,
    "outputs/b": HEAD,
    "outputs/reasoner_a": LANGUAGE,
    "outputs/reasoner_b": LANGUAGE,
    "outputs/chain_of_thought": LANGUAGE,
}
ADDRESS, EMBEDDED = "127.0.0.1:8000", "smollm2-135m"


@dataclass(frozen=True)
class Block:
    """A block: its page, its line there, its code, and why it does not run ("" if it does)."""

    page: str
    line: int
    code: str
    reason: str

    @property
    def folders(self) -> list[str]:
        """The folders of models that it names."""
        return re.findall(r"[\"'](outputs/\w+)[\"']", self.code)


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        reason = (found["reason"] or "").strip()
        assert reason or not found["mark"], f"{page.name}: a no-run without a reason"
        yield Block(page.name, text[: found.start("code")].count("\n") + 1, found["code"], reason)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Their blocks change a model or train several.
SLOW_PAGES = ("post_training.md", "pruning.md", "quantization.md")
BLOCKS = {page.name: blocks for page in PAGES if (blocks := list(blocks_of(page)))}


def test_blocks_are_found_and_nearly_all_run() -> None:
    every = [block for blocks in BLOCKS.values() for block in blocks]
    fences = sum(page.read_text(encoding="utf-8").count("\n```python") for page in PAGES)
    assert len(every) == fences >= 15
    left_out = [block for block in every if block.reason]
    assert len(left_out) <= 2, left_out
    for block in left_out:
        compile(block.code, f"{block.page}:{block.line}", "exec")


def test_a_block_that_does_not_run_needs_a_reason(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- no-run: needs two GPUs -->\n```python\na = 1\n```\n\ntext\n\n```python\nb = 2\n```\n")
    assert list(blocks_of(page)) == [
        Block("page.md", 3, "a = 1\n", "needs two GPUs"),
        Block("page.md", 9, "b = 2\n", ""),
    ]
    page.write_text("<!-- no-run: -->\n```python\na = 1\n```\n")
    with pytest.raises(AssertionError, match="a no-run without a reason"):
        list(blocks_of(page))


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, pico_folder: Path, pico_tokenizer: Path
) -> Mapping[str, list[Path]]:
    """Two finished runs of each kind."""
    folder = tmp_path_factory.mktemp("stand_ins")
    rows = [{"text": f"{text} {i}", "label": label} for i in range(6) for text, label in (("where is it", "order_status"), ("charged twice", "billing"))]  # fmt: skip
    found: dict[str, list[Path]] = {HEAD: [], LANGUAGE: []}
    for seed in (1, 2):
        config = {
            "computation": {"mode": "posttraining", "method": "fine_tuning"},
            "training": {"learning_rate": 0.01, "num_epochs": 1, "seed": seed, "precision": "fp32", "device": "cpu"},
            "data": {"pretrained_weights": str(pico_folder), "output_dir": str(folder / f"head_{seed}")},
        }
        found[HEAD].append(loopos.train(config, data=rows, quiet=True).folder)
        weights = pico_folder if seed == 1 else save_pico("llama", folder / "other", pico_tokenizer)
        pretrained = load_pretrained(str(weights), causal=True)
        run = folder / f"language_{seed}"
        run.mkdir()
        description = {"method": "chain_of_thought", "stop_tokens": [2], "precision": "fp32"}
        save_language_model(run / "model", pretrained.model, pretrained.tokenizer, description)
        found[LANGUAGE].append(run)
    return found


def lay_out(folder: Path, pico_folder: Path) -> None:
    """The files that pages name: a text, and the configs with their data, small."""
    (folder / "text.txt").write_text("\n\n".join(FILLERS * 20), encoding="utf-8")
    (folder / "data").mkdir()
    lines = ["text\tlabel", *(f"{text} {i}\t{i % 10}" for i, text in enumerate(FILLERS * 12))]
    (folder / "data" / "classification_train.txt").write_text("\n".join(lines), encoding="utf-8")
    problems = [
        {"problem": f"What is {i} + 2?", "reasoning": [f"{i} + 2 = {i + 2}"], "answer": str(i + 2)} for i in range(24)
    ]
    write_jsonl(folder / "data" / "reasoning_examples.jsonl", problems)
    (folder / "configs").mkdir()
    for file in (ROOT / "configs").glob("*.json"):
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config["training"] |= {"max_steps": 2, "precision": "fp32", "batch_size": 4}
        config["model"] = {key: value for key, value in config.get("model", {}).items() if key == "num_classes"}
        if "pretrained_weights" in config["data"]:
            config["data"]["pretrained_weights"] = str(pico_folder)
        if "reasoning_examples" in config["data"]:
            config["data"]["reasoning_examples"] = "data/reasoning_examples.jsonl"
            config |= {"generation": {"max_new_tokens": 8}, "evaluation": {"problems": 2, "samples": 2}}
        (folder / "configs" / file.name).write_text(json.dumps(config), encoding="utf-8")


@contextmanager
def serving(model: Path) -> Iterator[Server]:
    """What `loopos serve outputs/chain_of_thought` starts, in a thread."""
    limits, metrics = ServingLimits(max_rows=4), ServingMetrics()
    service = LanguageService(Reasoner.open(str(model), max_rows=4), "chain_of_thought", limits, metrics)
    with served(service, limits, metrics) as server:
        yield server


@pytest.mark.usefixtures("few_goes")
@pytest.mark.parametrize("page", slow_but([page for page in BLOCKS if page not in SLOW_PAGES], BLOCKS))
def test_the_blocks_of_a_page_run(
    page: str,
    models: Mapping[str, list[Path]],
    pico_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(METHODS, "_rows", dict(METHODS._rows))
    monkeypatch.setattr(METHODS, "_sources", dict(METHODS._sources))
    lay_out(tmp_path, pico_folder)
    namespace: dict[str, Any] = {"__name__": "page"}
    ran = 0
    with ExitStack() as stack:
        for block in BLOCKS[page]:
            if block.reason:
                continue
            for folder in block.folders:
                if (kind := STAND_INS.get(folder)) and not Path(folder).exists():
                    shutil.copytree(models[kind][folder.endswith("b")], folder)
            code = block.code.replace(EMBEDDED, str(pico_folder))
            if ADDRESS in code:
                server = stack.enter_context(serving(pico_folder))
                code = code.replace(ADDRESS, server.url.removeprefix("http://"))
            # Lines count as in the page, so that a failure points there.
            exec(compile("\n" * (block.line - 1) + code, block.page, "exec"), namespace)
            ran += 1
    assert ran == sum(not block.reason for block in BLOCKS[page])
