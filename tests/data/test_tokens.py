"""Text → token ids: what is cut is counted or is an error, special tokens come once, pairs keep their segments."""

from __future__ import annotations

from pathlib import Path

import pytest
from pico_runs import pair_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.config.diagnostics import DataError, UserError
from loopos.data.formats import Labeled
from loopos.data.rows import Row
from loopos.data.tokens import encode_labeled, longest


@pytest.fixture(scope="module")
def plain(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    """Adds no special tokens."""
    return AutoTokenizer.from_pretrained(pico_tokenizer)


@pytest.fixture(scope="module")
def framing(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Adds [CLS] and [SEP], and gives segment ids."""
    return AutoTokenizer.from_pretrained(pair_tokenizer(tmp_path_factory.mktemp("framing")))


@pytest.fixture(scope="module")
def with_ends(pico_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Adds <bos> in front and <eos> behind by itself."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(pico_tokenizer / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    folder = tmp_path_factory.mktemp("ends")
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def examples(*texts: str | tuple[str, str]) -> list[Labeled]:
    return [
        Labeled(
            text if isinstance(text, str) else text[0],
            None if isinstance(text, str) else text[1],
            None,
            Row({}, "mail.jsonl", 10 + i, i),
        )
        for i, text in enumerate(texts)
    ]


def test_every_token_is_kept_or_counted_as_cut(plain: PreTrainedTokenizerBase) -> None:
    texts = ["good value", "the parcel came late and the box was open", "my card was charged twice for one order"]
    whole, report = encode_labeled(plain, examples(*texts), max_length=None)
    assert [example.index for example in whole] == [0, 1, 2]
    assert (report.cut, report.tokens_cut) == (0, 0)
    assert "cut" not in report.summary()
    assert [plain.decode(example.ids) for example in whole] == texts
    lengths = [len(example.ids) for example in whole]
    limit = lengths[0]
    assert limit < min(lengths[1:])
    cut, report = encode_labeled(plain, examples(*texts), max_length=limit)
    assert all(example.ids == full.ids[:limit] for example, full in zip(cut, whole, strict=True))
    assert [example.cut for example in cut] == [0, lengths[1] - limit, lengths[2] - limit]
    assert (report.used, report.cut, report.tokens) == (3, 2, 3 * limit)
    assert report.tokens + report.tokens_cut == sum(lengths)
    assert f"2 cut at {limit} ({sum(lengths) - 3 * limit} tokens lost)" in report.summary()


def test_truncation_as_an_error_names_file_and_line_of_every_row(plain: PreTrainedTokenizerBase) -> None:
    rows = examples("a", "where is the invoice for march", "b", "never again: cold food and a rude waiter")
    with pytest.raises(DataError) as caught:
        encode_labeled(plain, rows, max_length=3, on_truncation="error")
    assert [(diagnostic.source, diagnostic.line, diagnostic.field) for diagnostic in caught.value.diagnostics] == [
        ("mail.jsonl", 11, "text"),
        ("mail.jsonl", 13, "text"),
    ]
    assert "expected at most 3 (training.max_length)" in str(caught.value)
    kept, _ = encode_labeled(plain, examples("a", "b"), max_length=3, on_truncation="error")
    assert len(kept) == 2


def test_special_tokens_come_once(with_ends: PreTrainedTokenizerBase) -> None:
    encoded, _ = encode_labeled(with_ends, examples("good value", "it broke"), max_length=None)
    for example in encoded:
        assert (example.ids.count(1), example.ids.count(2)) == (1, 1)
        assert (example.ids[0], example.ids[-1]) == (1, 2)
    # Cutting takes text, never the ends.
    cut, report = encode_labeled(with_ends, examples("the parcel came late and the box was open"), max_length=5)
    assert (len(cut[0].ids), cut[0].ids[0], cut[0].ids[-1]) == (5, 1, 2)
    assert report.cut == 1


def test_pairs_have_segments_and_single_texts_beside_them_too(framing: PreTrainedTokenizerBase) -> None:
    cls, sep = framing.cls_token_id, framing.sep_token_id
    mixed = examples(("good film", "late"), "bad order", ("kind", "the lamp"))
    encoded, _ = encode_labeled(framing, mixed, max_length=None)
    one = framing.convert_tokens_to_ids(["good", "film"])
    other = framing.convert_tokens_to_ids(["late"])
    assert encoded[0].ids == [cls, *one, sep, *other, sep]
    assert encoded[0].token_types == [0, 0, 0, 0, 1, 1]
    assert encoded[1].token_types == [0, 0, 0, 0]
    assert encoded[1].ids[0] == cls
    assert encoded[1].ids[-1] == sep
    alone, _ = encode_labeled(framing, [mixed[2]], max_length=None)
    assert (alone[0].ids, alone[0].token_types) == (encoded[2].ids, encoded[2].token_types)


def test_a_cut_pair_keeps_both_texts_and_its_frame(framing: PreTrainedTokenizerBase) -> None:
    encoded, report = encode_labeled(framing, examples(("good film order lamp", "bad late")), max_length=7)
    ids, types = encoded[0].ids, encoded[0].token_types
    assert types is not None
    assert len(ids) == len(types) == 7
    assert ids.count(framing.sep_token_id) == 2
    assert sorted(set(types)) == [0, 1]
    assert (report.cut, report.tokens_cut) == (1, 2)


def test_a_limit_that_the_special_tokens_fill_is_refused(framing: PreTrainedTokenizerBase) -> None:
    # transformers does not cut at all then, which would pass the limit without a word.
    with pytest.raises(
        UserError, match=r"training\.max_length: got 2; expected at least 3: .* 2 special tokens to a text"
    ):
        encode_labeled(framing, examples("good film order"), max_length=2)
    with pytest.raises(UserError, match=r"got 3; expected at least 5: .* 3 special tokens to a pair of texts"):
        encode_labeled(framing, examples(("good film", "bad late")), max_length=3)
    encoded, _ = encode_labeled(framing, examples("good film order"), max_length=3)
    assert len(encoded[0].ids) == 3


def test_an_empty_text(plain: PreTrainedTokenizerBase, framing: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"mail\.jsonl:11: text: got text without tokens"):
        encode_labeled(plain, examples("a", ""), max_length=None)
    # A tokenizer that frames its texts gives tokens for an empty one.
    encoded, _ = encode_labeled(framing, examples(""), max_length=None)
    assert encoded[0].ids == [framing.cls_token_id, framing.sep_token_id]


def test_the_limit_is_the_smallest_of_those_known(
    plain: PreTrainedTokenizerBase, framing: PreTrainedTokenizerBase
) -> None:
    assert plain.model_max_length == 512
    assert longest(plain, None, None) == 512
    assert longest(plain, 256, None) == 256
    assert longest(plain, 256, 100) == 100
    assert longest(plain, 256, 9999) == 256
    assert longest(framing, None, None) == 64
    framing_without = AutoTokenizer.from_pretrained(framing.name_or_path)
    framing_without.model_max_length = int(1e30)
    assert longest(framing_without, None, None) is None
    assert longest(framing_without, 2048, None) == 2048
