"""One report says what was used of data, whoever made it, and in one form."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loopos.data.formats import read_labeled
from loopos.data.preference_tokens import encode_comparisons, encode_prompts
from loopos.data.preferences import read_comparisons
from loopos.data.prompts import REPEATED, read_prompts
from loopos.data.reading import DataReport
from loopos.data.rows import read
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import read_supervised
from loopos.data.supervised_tokens import encode_supervised
from loopos.data.tokens import encode_labeled

OF_ROWS = ["read", "used", "dropped"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, pico_tokenizer: Path) -> dict[str, tuple[DataReport, DataReport]]:
    """Kind of data → the report of reading, and that of tokenizing."""
    folder, tokenizer = tmp_path_factory.mktemp("rows"), AutoTokenizer.from_pretrained(pico_tokenizer)
    for name, lines in {
        "labeled": [
            '{"text": "the parcel came late", "label": "a", "more": 1}',
            '{"text": "bad", "label": "b", "more": 2}',
        ],
        "supervised": ['{"prompt": "a box", "completion": " was open"}'] * 3,
        "pairs": ['{"prompt": "where", "chosen": "on the way", "rejected": "no"}'] * 2,
    }.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    labeled, of_labeled = read_labeled(read(str(folder / "labeled.jsonl")), {})
    examples, of_supervised = read_supervised(
        read(str(folder / "supervised.jsonl")), {}, step_format=NAMED_FORMATS["think"]
    )
    pairs, of_pairs = read_comparisons(read(str(folder / "pairs.jsonl")), {}, as_text=True)
    prompts, of_prompts = read_prompts(read(str(folder / "pairs.jsonl")), {}, as_text=True)
    form = NAMED_FORMATS["think"]
    return {
        "labeled": (of_labeled, encode_labeled(tokenizer, labeled, max_length=3)[1]),
        "supervised": (
            of_supervised,
            encode_supervised(tokenizer, examples, step_format=form, max_length=None)[1],
        ),
        "pairs": (of_pairs, encode_comparisons(tokenizer, pairs, template=None, max_length=None)[1]),
        "prompts": (of_prompts, encode_prompts(tokenizer, prompts, template=None, max_length=None)[1]),
    }


def test_read_is_used_and_dropped_in_every_report(reports: dict[str, tuple[DataReport, DataReport]]) -> None:
    assert len(reports) == 4
    for both in reports.values():
        for report in both:
            assert report.read == report.used + sum(report.dropped.values()) > 0
            dropped = "".join(f", {count} dropped ({reason})" for reason, count in report.dropped.items())
            assert report.summary().startswith(f"{report.read} rows read, {report.used} used{dropped}")
    assert {kind: both[0].dropped for kind, both in reports.items() if both[0].dropped} == {"prompts": {REPEATED: 1}}
    assert reports["labeled"][0].summary().endswith("; not read: more")


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("labeled", []),
        ("supervised", ["trained_tokens"]),
        ("pairs", ["responses", "pairs"]),
        ("prompts", ["responses", "pairs"]),
    ],
)
def test_the_log_has_the_counts_of_its_kind(
    kind: str, own: list[str], reports: dict[str, tuple[DataReport, DataReport]]
) -> None:
    found = reports[kind][1].counts()
    expected = [*OF_ROWS, "responses", "pairs", "tokens", "trained_tokens", "cut", "tokens_cut", "max_length"]
    others = {"responses", "pairs", "trained_tokens"} - set(own)
    assert list(found) == [name for name in expected if name not in others]


def test_the_text_names_what_each_kind_counts(reports: dict[str, tuple[DataReport, DataReport]]) -> None:
    labeled, supervised, pairs, prompts = (both[1] for both in reports.values())
    assert labeled.cut == 1
    assert labeled.summary().endswith(f"; 1 cut at 3 ({labeled.tokens_cut} tokens lost)")
    share = f"{supervised.trained_tokens} trained ({(supervised.trained_tokens or 0) / supervised.tokens:.0%})"
    assert f"; {supervised.tokens} tokens, {share}, length " in supervised.summary()
    assert f"; 4 responses, 2 pairs, {pairs.tokens} tokens, length " in pairs.summary()
    assert prompts.summary().startswith(f"1 rows read, 1 used; {prompts.tokens} tokens, length ")


def test_nothing_is_said_of_tokens_before_there_are_any() -> None:
    assert DataReport(read=2, used=1, dropped={"blank": 1}).summary() == "2 rows read, 1 used, 1 dropped (blank)"
