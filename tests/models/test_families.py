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

Every causal language model family of transformers {version}, at pico size with random weights: {total} families, {right} right in all that is not refused,
{padded} of them with padded rows, {refused} refused as language models, {untried} not tried. The page is written by `tests/models/test_families.py`, which checks
every cell through the commands' own code:

- training: the loss and its gradient against transformers' own forward pass of each sequence alone (1e-5), then two steps of `chain_of_thought` in full. "packed"
  rows have no pads; "padded" is slower and as exact;
- LoRA: two steps with adapters, saved as peft's folder and folded into the weights. peft turns adapters of experts that lie in one tensor into adapters of that
  tensor; shared experts and dense layers of the same names stay without;
- generation: greedy tokens against whole passes of transformers; "cached" rows share a key-value cache of LoopOS, "plain" rows run one by one;
- head and reward: two steps of `fine_tuning` and of `reward_model`;
- export: the trained weights as a Hugging Face folder, opened again; GGUF: as a file for llama.cpp; merge: the mean of two models, tensor by tensor.

"–" stands for refused: the command ends in a sentence that names the family or what it lacks. Families that read pictures or sound are tried with text only.

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
def test_a_family_is_right_or_refused_by_name(family: str, tmp_path: Path, pico_tokenizer: Path) -> None:
    RESULTS[family] = FamilyRun(pico_causal(family), pico_tokenizer, tmp_path).results()
    assert set(RESULTS[family]) == set(CHECKS)


def test_the_page_equals_the_results() -> None:
    if len(RESULTS) < len(FAMILIES) - len(NOT_TRIED):
        pytest.skip("only some families were tried")
    page = page_of(RESULTS)
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        PAGE.write_text(page, encoding="utf-8")
        pytest.fail("docs/architectures.md told something else and is written anew: read what changed, and commit it")


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
