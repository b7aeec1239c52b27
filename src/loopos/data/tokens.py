"""Tokenize texts for heads and for pretraining, and train a tokenizer.

`TextBound` shortens very long texts first: tokenizing 100 MB takes more than 20 GB of memory, to keep 256 tokens of it.
The first tokens do not change: the text is cut before a blank between two ASCII letters or digits, and only if no token
of the vocabulary contains a letter or digit followed by a blank. Then no token spans the cut. Every BPE merge makes a
token of the vocabulary, so no merge spans it either; the best split of a unigram model also divides there, and
WordPiece never joins words. For other vocabularies and tokenizers texts are not cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loopos.config.diagnostics import DataError, Diagnostic, UserError
from loopos.data.formats import Labeled
from loopos.data.reading import DataReport

SHORT_CHARACTERS = 1 << 17
"""Texts up to this are tokenized whole, so that what is lost of them is counted exactly (characters)."""
CHARACTERS_PER_TOKEN = 32
"""Characters of the first try for each token that is expected, doubled until it has that many."""
CHUNK_CHARACTERS = 1 << 22
"""Characters that are tokenized at a time, longer texts one by one: about 200 bytes of memory each."""
_CUT = re.compile(r"[A-Za-z0-9](?= [A-Za-z0-9])")
_SPANS_CUT = re.compile(r"[A-Za-z0-9][ Ġ▁]")
_SEARCHED = 1 << 16
# What lies behind the tokens that are expected: more than the longest look ahead of any splitting into words.
_MARGIN_TOKENS = 16
_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")


class TextBound:
    """Shortens very long texts for one tokenizer without changing their first tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def is_safe(self) -> bool:
        """Whether a cut leaves the tokens before it unchanged; decided once from the vocabulary."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or type(backend.model).__name__ not in _KINDS:
            return False
        return not any(_SPANS_CUT.search(token) for token in self.tokenizer.get_vocab())

    def beginning(self, text: str, num_tokens: int | None, *, short: int | None = None) -> str:
        """The beginning of a long text with more than `num_tokens` tokens, which equal those of the whole text.

        Returns the text itself if it is short, cannot be cut safely, or `num_tokens` is None (all tokens are needed).
        `short`: length in characters up to which texts stay whole; `SHORT_CHARACTERS` by default.
        """
        short = SHORT_CHARACTERS if short is None else short
        if num_tokens is None or len(text) <= short or not self.is_safe:
            return text
        size = max(CHARACTERS_PER_TOKEN * num_tokens, short)
        while size < len(text):
            cut = _CUT.search(text, size, size + _SEARCHED)
            if cut is not None:
                beginning = text[: cut.end()]
                if self.count(beginning) > num_tokens + _MARGIN_TOKENS:
                    return beginning
            size *= 2
        return text

    def count(self, text: str) -> int:
        """Number of tokens of a text, without special tokens."""
        batch = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return len(batch["input_ids"])


def spans(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Start and end of runs of at most `most` texts and `CHUNK_CHARACTERS` characters (a longer text is a run of its
    own). `sizes`: characters of each text.
    """
    first, total = 0, 0
    for index, size in enumerate(sizes):
        if index > first and (index - first == most or total + size > CHUNK_CHARACTERS):
            yield first, index
            first, total = index, 0
        total += size
    if first < len(sizes):
        yield first, len(sizes)


_CHUNK = 1024
_MOST_COUNTED = 1 << 21


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as tokens.

    `ids` are never empty; `token_types` are segment ids of sentence pairs, if the tokenizer has them; `index` of the
    example in its split; `cut` counts truncated tokens. `weights`, as long as `ids`: weight of each token in the loss
    as a target, 0 = context (always for the first token); None if the method decides what is trained.
    """

    ids: list[int]
    token_types: list[int] | None
    index: int
    cut: int = 0
    weights: list[float] | None = None


def longest(tokenizer: PreTrainedTokenizerBase, max_positions: int | None, requested: int | None) -> int | None:
    """The maximum length of an example: the requested one, limited by the model's positions; None = no limit."""
    limits = [
        limit
        for limit in (requested, max_positions, tokenizer.model_max_length)
        if limit is not None and 0 < limit < 10**9
    ]
    return min(limits) if limits else None


def encode_labeled(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Labeled],
    *,
    max_length: int | None,
    on_truncation: str = "truncate",
) -> tuple[list[Encoded], DataReport]:
    """Tokenize texts, and text pairs, with the special tokens that the tokenizer itself adds.

    Raises `DataError` naming file and line for an example that gives no token, and for every example over `max_length`
    when `on_truncation` is "error".
    """
    encoded: list[Encoded] = []
    diagnostics: list[Diagnostic] = []
    report = DataReport(max_length=max_length)
    bound = TextBound(tokenizer)
    # Truncation on the left needs the end of the text.
    expected = max_length if tokenizer.truncation_side == "right" else None
    for first, last in spans([_size(example) for example in examples], _CHUNK):
        chunk = [_beginning(example, bound, expected) for example in examples[first:last]]
        long = [_size(short) < _size(example) for short, example in zip(chunk, examples[first:last], strict=True)]
        whole = _tokenize(tokenizer, chunk, None)
        over = [i for i, ids in enumerate(whole["input_ids"]) if max_length is not None and len(ids) > max_length]
        if over:
            _check_room(tokenizer, chunk, max_length)
        near = [_near(chunk[i], examples[first + i], bound, expected) for i in over]
        cut = dict(zip(over, _rows(_tokenize(tokenizer, near, max_length)), strict=True)) if over else {}
        for i, (ids, types) in enumerate(_rows(whole)):
            cut_ids, cut_types = cut.get(i, (ids, types))
            if not cut_ids:
                diagnostics.append(_diagnostic(chunk[i], "text without tokens", "text with at least one token"))
            elif i in cut and on_truncation == "error":
                diagnostics.append(
                    _diagnostic(
                        chunk[i],
                        f"{'at least ' if long[i] else ''}{len(ids)} tokens",
                        f"at most {max_length} (training.max_length), because data.on_truncation is error",
                    )
                )
            encoded.append(Encoded(cut_ids, cut_types, first + i, len(ids) - len(cut_ids)))
            report.cut += i in cut
            report.shortened += long[i]
    if diagnostics:
        raise DataError(diagnostics)
    lengths = [len(example.ids) for example in encoded]
    report.read, report.used, report.lengths = len(examples), len(encoded), lengths
    report.tokens, report.tokens_cut = sum(lengths), sum(example.cut for example in encoded)
    return encoded, report


def _size(example: Labeled) -> int:
    return len(example.text) + len(example.text_pair or "")


def _beginning(example: Labeled, bound: TextBound, num_tokens: int | None, short: int | None = None) -> Labeled:
    """The example with very long texts shortened; `short` as in `beginning`."""
    text, pair = bound.beginning(example.text, num_tokens, short=short), example.text_pair
    pair = None if pair is None else bound.beginning(pair, num_tokens, short=short)
    is_whole = text is example.text and pair is example.text_pair
    return example if is_whole else replace(example, text=text, text_pair=pair)


def _near(example: Labeled, whole: Labeled, bound: TextBound, num_tokens: int | None) -> Labeled:
    """The example with texts a little longer than what truncation keeps.

    A tokenizer stores what it truncates in chunks, and for a pair the product of both. Of a pair it truncates the
    longer text first, so the longer text must stay the longer one: by tokens, or by characters if
    counting tokens is too slow.
    """
    near = _beginning(example, bound, num_tokens, short=1)
    if near is whole or near.text_pair is None or whole.text_pair is None:
        return near
    length = bound.count if _size(whole) <= _MOST_COUNTED else len
    is_first_longer = length(whole.text) > length(whole.text_pair)
    counts = bound.count(near.text), bound.count(near.text_pair)
    if (counts[0] > counts[1]) == is_first_longer:
        return near
    if is_first_longer:
        return replace(near, text=bound.beginning(whole.text, max(counts), short=1))
    return replace(near, text_pair=bound.beginning(whole.text_pair, max(counts), short=1))


def _check_room(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Labeled], max_length: int | None) -> None:
    """Raise `UserError` if special tokens fill `max_length`: the tokenizer would then not truncate."""
    pairs = any(example.text_pair is not None for example in examples)
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length is not None and max_length <= special:
        raise UserError(
            f"training.max_length: got {max_length}; expected at least {special + 1 + pairs}: this tokenizer adds "
            f"{special} special tokens to {'a pair of texts' if pairs else 'a text'}"
        )


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Labeled], max_length: int | None
) -> dict[str, list[list[int]]]:
    """Ids and, if the tokenizer has them, segment ids; examples with and without a second text may be mixed."""
    texts = [
        (example.text, example.text_pair) if example.text_pair is not None else example.text for example in examples
    ]
    limits = {"truncation": True, "max_length": max_length} if max_length is not None else {"truncation": False}
    if any(isinstance(text, tuple) for text in texts) and not all(isinstance(text, tuple) for text in texts):
        parts = [_tokenize(tokenizer, [example], max_length) for example in examples]
        return {name: [part[name][0] for part in parts] for name in parts[0]}
    pairs = all(isinstance(text, tuple) for text in texts)
    batch = tokenizer(
        [text[0] if isinstance(text, tuple) else text for text in texts],
        [text[1] for text in texts if isinstance(text, tuple)] if pairs else None,
        add_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
        **limits,
    )
    return {name: batch[name] for name in ("input_ids", "token_type_ids") if name in batch}


def _rows(batch: dict[str, list[list[int]]]) -> list[tuple[list[int], list[int] | None]]:
    types = batch.get("token_type_ids")
    return [(ids, types[i] if types is not None else None) for i, ids in enumerate(batch["input_ids"])]


def _diagnostic(example: Labeled, actual: str, expected: str) -> Diagnostic:
    return Diagnostic(example.row.source, example.row.line, None, "text", actual, expected)


PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer (Sennrich et al. 2016; Radford et al. 2019) of at most `vocab_size` tokens.

    It encodes every text without loss; pad, BOS and EOS are separate tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]


def encode_corpus(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], *, max_length: int) -> list[Encoded]:
    """Tokenize documents, each with EOS, into chunks of at most `max_length` tokens; no chunk spans two documents.

    A chunk starts with the last token of the previous one, so that every token except a document's first is predicted
    once. `index` is the document's index.
    """
    assert max_length >= 2, max_length
    chunks: list[Encoded] = []
    for begin, end in spans([len(document) for document in documents], len(documents)):
        batch = tokenizer(list(documents[begin:end]), add_special_tokens=False, verbose=False)["input_ids"]
        for index, ids in enumerate(batch, start=begin):
            whole = [*ids, tokenizer.eos_token_id]
            for first in range(0, len(whole) - 1, max_length - 1):
                chunks.append(Encoded(whole[first : first + max_length], None, index))
    return chunks
