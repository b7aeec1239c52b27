"""Every causal language model family of transformers: correct, or refused by name; docs/architectures.md lists the results.

Slow: some ten minutes. A family that a new release of transformers adds is tested as soon as it is there.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from causal_families import FAMILIES, NOT_TRIED, pico_causal
from family_checks import CHECKS, FamilyRun

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """# Architectures

This page lists which model families work. It covers every causal language model family of transformers {version}, at pico size with random weights: of {total} families, {right} work as language models in every cell that is not refused, {padded} of them with padded rows; {refused} are refused as language models, and {untried} were not tried.

`tests/models/test_families.py` writes the page and checks every cell through the code of the commands:

- training: the loss and its gradient compared with transformers' own forward pass of each single sequence (1e-5), then two complete steps of `chain_of_thought`. "packed" rows have no padding; "padded" is slower and equally exact;
- LoRA: two steps with adapters, saved as peft's folder and merged into the weights. If experts are stored in one tensor, peft turns their adapters into adapters of that tensor; shared experts and dense layers of the same names get none;
- generation: greedy tokens compared with full passes of transformers; "cached" rows use LoopOS's key-value cache together, "plain" rows run one by one;
- head and reward: two steps of `fine_tuning` and of `reward_model`;
- export: the trained weights as a Hugging Face folder, opened again; GGUF: as a file for llama.cpp; merge: the mean of two models, tensor by tensor.

"–" means refused: the command ends in a sentence that names the family or what it lacks. Families that read pictures or sound are tested only with text.

| family | training | LoRA | generation | head | reward | export | GGUF | merge |
|---|---|---|---|---|---|---|---|---|
"""
# How far a refused model's logits are from E·h: its last digits depend on the processor.
_MEASURED = re.compile(r" by [0-9.e+-]+(?=\))")
RESULTS: dict[str, dict[str, str]] = {}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # transformers' and peft's own, which differ by family
]


def test_nothing_untried_is_tried_elsewhere() -> None:
    assert set(NOT_TRIED) <= set(FAMILIES)
    assert len(NOT_TRIED) < 20


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_TRIED])
def test_a_family_works_or_is_refused_by_name(family: str, tmp_path: Path, pico_tokenizer: Path) -> None:
    RESULTS[family] = FamilyRun(pico_causal(family), pico_tokenizer, tmp_path).results()
    assert set(RESULTS[family]) == set(CHECKS)


def test_the_page_equals_the_results() -> None:
    if len(RESULTS) < len(FAMILIES) - len(NOT_TRIED):
        pytest.skip("only some families were tried")
    page = page_of(RESULTS)
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        PAGE.write_text(page, encoding="utf-8")
        pytest.fail("docs/architectures.md differed and is rewritten: read what changed, and commit it")


def page_of(found: dict[str, dict[str, str]]) -> str:
    import transformers

    language = {family: cells for family, cells in found.items() if cells["loss"].startswith("right")}
    head = HEAD.format(
        version=transformers.__version__,
        total=len(FAMILIES),
        right=len(language),
        padded=sum("padded" in cells["loss"] for cells in language.values()),
        refused=len(found) - len(language),
        untried=len(NOT_TRIED),
    )
    rows = [f"| {family} | {' | '.join(_cells(cells))} |" for family, cells in found.items()]
    reasons = [
        f"- {family}: {_MEASURED.sub('', cells['loss'].removeprefix('refused: '))}"
        for family, cells in found.items()
        if family not in language
    ]
    untried = [f"- {family}: {reason}" for family, reason in NOT_TRIED.items()]
    parts = [
        head + "\n".join(rows),
        "## Refused as language models",
        "\n".join(reasons),
        "## Not tried",
        "\n".join(untried),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(cells: dict[str, str]) -> list[str]:
    loss = "–" if cells["loss"].startswith("refused") else "padded" if "padded" in cells["loss"] else "packed"
    generation = (
        "–" if cells["generate"].startswith("refused") else "plain" if "no cache" in cells["generate"] else "cached"
    )
    others = [
        "–" if cells[name].startswith("refused") else "yes" for name in ("classify", "score", "export", "gguf", "merge")
    ]
    return [loss, "–" if cells["lora"].startswith("refused") else "yes", generation, *others]
