"""Texts that are far longer than a model reads → their beginnings, which give the same first tokens.

Enters: a tokenizer, a text, how many tokens of it are expected. Leaves: the text, or a beginning of it that has more
tokens than that, the same ones. Tokenising 100 MB takes more than 20 GB of memory, to keep 256 tokens of it.

Why the tokens are equal: the text is cut before a blank that stands between two ASCII letters or digits. The
vocabulary is searched for a token that holds a letter or digit followed by a blank. Where there is none, no token
spans the cut; every merge of BPE makes a token of the vocabulary, so that no merge ever spanned it either, and both
sides are merged as if the other were not there. The likeliest split of a unigram model parts there as well, and
WordPiece never joins words. Where there is such a token, or another kind of tokenizer, texts are never cut.
Left out: how long a row may be (`tokens`, `supervised_tokens`).

Examples → token ids. The only place where text becomes tokens.

Enters: `Labelled` examples and a tokenizer. Leaves: `Encoded` examples, and a report of what was cut. Left out:
batching.

Documents for pretraining → a tokenizer → pieces of tokens.

Enters: documents. Leaves: a byte-level BPE tokenizer trained on them, `Encoded` pieces. Left out: how documents are
read (`corpus`), batches, the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loopos.config.diagnostics import DataError, Diagnostic, UserError
from loopos.data.formats import Labelled

SHORT_CHARACTERS = 1 << 17
"""Texts up to this are tokenised whole, so that what is lost of them is counted exactly (characters)."""
CHARACTERS_PER_TOKEN = 32
"""Characters of the first try for each token that is expected, doubled until it has that many."""
CHUNK_CHARACTERS = 1 << 22
"""Characters that are tokenised at a time, longer texts alone: some 200 bytes of memory each."""
_CUT = re.compile(r"[A-Za-z0-9](?= [A-Za-z0-9])")
_SPANS_CUT = re.compile(r"[A-Za-z0-9][ Ġ▁]")
_SEARCHED = 1 << 16
# What lies behind the tokens that are expected: more than the longest look ahead of any splitting into words.
_MARGIN_TOKENS = 16
_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")


class TextBound:
    """Cuts texts for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def is_safe(self) -> bool:
        """Whether the tokens before a cut are those of the whole text: by the vocabulary, read once."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or type(backend.model).__name__ not in _KINDS:
            return False
        return not any(_SPANS_CUT.search(token) for token in self.tokenizer.get_vocab())

    def beginning(self, text: str, num_tokens: int | None, *, short: int | None = None) -> str:
        """The beginning of a long text that has more than `num_tokens` tokens, those of the whole text; the text itself
        where it is short, may not be cut, or has nowhere to cut it. None: all tokens are expected. short: characters up
        to which a text is left whole; `SHORT_CHARACTERS` when absent.
        """
        short = SHORT_CHARACTERS if short is None else short
        if num_tokens is None or len(text) <= short or not self.is_safe:
            return text
        size = max(CHARACTERS_PER_TOKEN * num_tokens, short)
        while size < len(text):
            cut = _CUT.search(text, size, size + _SEARCHED)
            if cut is not None:
                begun = text[: cut.end()]
                if self.count(begun) > num_tokens + _MARGIN_TOKENS:
                    return begun
            size *= 2
        return text

    def count(self, text: str) -> int:
        """The tokens of a text, without special ones."""
        batch = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return len(batch["input_ids"])


def spans(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Begin and end of runs of neighbours: at most `most` of them, and at most `CHUNK_CHARACTERS` where one alone does
    not have more. sizes: characters of each.
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
    """One example as tokens. `ids` are never empty; `token_types` are the segment ids of sentence pairs, for
    tokenizers that make them; `index` is the example's place in its file or split; `cut` counts the tokens that were
    truncated. `weights`, as long as `ids`: the factor on the loss of each token as the target of those before it, 0 =
    context, which the first token always is; None where a method says itself what is learned.
    """

    ids: list[int]
    token_types: list[int] | None
    index: int
    cut: int = 0
    weights: list[float] | None = None


@dataclass
class TokenReport:
    """What tokenising did: examples, tokens kept, examples cut and the tokens that they lost. `shortened`: texts so
    long that their ends were never tokenised; what they lost is counted as far as it was.
    """

    examples: int = 0
    tokens: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    max_length: int | None = None
    shortened: int = 0
    lengths: list[int] = field(default_factory=list, repr=False)

    def summary(self) -> str:
        middle = length_spread(self.lengths) or "no tokens"
        cut = (
            f"; {self.truncated} cut at {self.max_length} "
            f"({'at least ' if self.shortened else ''}{self.tokens_cut} tokens lost)"
            if self.truncated
            else "; none cut"
        )
        return f"{self.examples} examples, {self.tokens:,} tokens, {middle}{cut}"


def length_spread(lengths: Sequence[int]) -> str:
    """The shortest, longest and median length in words; empty where there are none."""
    if not lengths:
        return ""
    ordered = sorted(lengths)
    return f"length {ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}"


def longest(tokenizer: PreTrainedTokenizerBase, max_positions: int | None, asked: int | None) -> int | None:
    """The number of tokens an example is cut at: what was asked for, never above what the model has positions for;
    None = no limit.
    """
    limits = [
        limit for limit in (asked, max_positions, tokenizer.model_max_length) if limit is not None and 0 < limit < 10**9
    ]
    return min(limits) if limits else None


def encode_labelled(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Labelled],
    *,
    max_length: int | None,
    on_truncation: str = "truncate",
) -> tuple[list[Encoded], TokenReport]:
    """Tokenises texts, and text pairs, with the special tokens that the tokenizer itself adds.

    Raises `DataError` naming file and line for an example that gives no token, and for every example over `max_length`
    when `on_truncation` is "error".
    """
    encoded: list[Encoded] = []
    diagnostics: list[Diagnostic] = []
    report = TokenReport(max_length=max_length)
    bound = TextBound(tokenizer)
    # What is cut at its front keeps its end.
    expected = max_length if tokenizer.truncation_side == "right" else None
    for first, last in spans([_size(example) for example in examples], _CHUNK):
        chunk = [_beginning(example, bound, expected) for example in examples[first:last]]
        long = [_size(short) < _size(example) for short, example in zip(chunk, examples[first:last], strict=True)]
        whole = _tokenise(tokenizer, chunk, None)
        over = [i for i, ids in enumerate(whole["input_ids"]) if max_length is not None and len(ids) > max_length]
        if over:
            _check_room(tokenizer, chunk, max_length)
        near = [_near(chunk[i], examples[first + i], bound, expected) for i in over]
        cut = dict(zip(over, _rows(_tokenise(tokenizer, near, max_length)), strict=True)) if over else {}
        for i, (ids, types) in enumerate(_rows(whole)):
            kept_ids, kept_types = cut.get(i, (ids, types))
            if not kept_ids:
                diagnostics.append(
                    _diagnostic(
                        chunk[i], "text without a single token", "text that the tokenizer turns into at least one token"
                    )
                )
            elif i in cut and on_truncation == "error":
                diagnostics.append(
                    _diagnostic(
                        chunk[i],
                        f"{'at least ' if long[i] else ''}{len(ids)} tokens",
                        f"at most {max_length} (training.max_length), since data.on_truncation is error",
                    )
                )
            encoded.append(Encoded(kept_ids, kept_types, first + i, len(ids) - len(kept_ids)))
            report.truncated += i in cut
            report.shortened += long[i]
    if diagnostics:
        raise DataError(diagnostics)
    report.examples, report.lengths = len(encoded), [len(example.ids) for example in encoded]
    report.tokens, report.tokens_cut = sum(report.lengths), sum(example.cut for example in encoded)
    return encoded, report


def _size(example: Labelled) -> int:
    return len(example.text) + len(example.text_pair or "")


def _beginning(example: Labelled, bound: TextBound, num_tokens: int | None, short: int | None = None) -> Labelled:
    """The example, with texts that are far too long cut to what is read of them at most; `short` as for `beginning`."""
    text, pair = bound.beginning(example.text, num_tokens, short=short), example.text_pair
    pair = None if pair is None else bound.beginning(pair, num_tokens, short=short)
    is_whole = text is example.text and pair is example.text_pair
    return example if is_whole else replace(example, text=text, text_pair=pair)


def _near(example: Labelled, whole: Labelled, bound: TextBound, num_tokens: int | None) -> Labelled:
    """The example with texts a little longer than what is kept of them: a tokenizer keeps what it cuts off in pieces,
    and those of a pair times each other.

    Of a pair the longer text is cut first, and has one token more in the end where both are: it stays the longer one.
    By tokens; by characters where a text is too long to be tokenised only to be counted.
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


def _check_room(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Labelled], max_length: int | None) -> None:
    """Raises `UserError` where the special tokens alone fill `max_length`: the tokenizer would not cut at all then."""
    pairs = any(example.text_pair is not None for example in examples)
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length is not None and max_length <= special:
        raise UserError(
            f"training.max_length: got {max_length}, expected at least {special + 1 + pairs}: this tokenizer adds "
            f"{special} special tokens to {'a pair of texts' if pairs else 'a text'}"
        )


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Labelled], max_length: int | None
) -> dict[str, list[list[int]]]:
    """Ids and, where the tokenizer makes them, segment ids; a chunk may mix examples with and without a second text."""
    texts = [
        (example.text, example.text_pair) if example.text_pair is not None else example.text for example in examples
    ]
    limits = {"truncation": True, "max_length": max_length} if max_length is not None else {"truncation": False}
    if any(isinstance(text, tuple) for text in texts) and not all(isinstance(text, tuple) for text in texts):
        parts = [_tokenise(tokenizer, [example], max_length) for example in examples]
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


def _diagnostic(example: Labelled, actual: str, expected: str) -> Diagnostic:
    return Diagnostic(example.row.source, example.row.line, None, "text", actual, expected)


PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer (Sennrich et al. 2016; Radford et al. 2019) of at most `vocab_size` tokens: every text
    can be written in it and read back. Pad, BOS and EOS are three tokens of their own.
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
    """Every document's tokens and its EOS, cut into pieces of at most `max_length`. No piece spans two documents.

    A piece begins with the last token of the one before it: every token but a document's first is predicted once.
    `index` is the document's place.
    """
    assert max_length >= 2, max_length
    pieces: list[Encoded] = []
    for begin, end in spans([len(document) for document in documents], len(documents)):
        batch = tokenizer(list(documents[begin:end]), add_special_tokens=False, verbose=False)["input_ids"]
        for index, ids in enumerate(batch, start=begin):
            whole = [*ids, tokenizer.eos_token_id]
            for first in range(0, len(whole) - 1, max_length - 1):
                pieces.append(Encoded(whole[first : first + max_length], None, index))
    return pieces
