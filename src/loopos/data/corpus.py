"""Plain text for pretraining: files and data sets → documents → a tokenizer → pieces of tokens.

Enters: a text file (documents are parted by blank lines), or any source of rows with a text column. Leaves: documents,
a byte-level BPE tokenizer trained on them, `Encoded` pieces. Left out: batches, the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loopos.config.faults import DataError, Fault
from loopos.data import rows
from loopos.data.decoding import PLAIN_RULES, TextRules, read_text
from loopos.data.formats import read_labelled
from loopos.data.reading import account
from loopos.data.text_bounds import spans
from loopos.data.tokens import Encoded

_TEXT_FILES = (".txt", ".md", ".text")
_BLANK_LINES = re.compile(r"\n[ \t\r]*\n\s*")
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


@dataclass(frozen=True)
class Corpus:
    """Documents in their order. `said`: what was read, in words."""

    documents: tuple[str, ...]
    said: str


def read_corpus(
    source: str, columns: Mapping[str, str], *, max_rows: int | None = None, rules: TextRules = PLAIN_RULES
) -> Corpus:
    """The documents of a text file, or the text column of any other source.

    Raises `DataError` for an unreadable file, one without text, or rows without a text column.
    """
    name = source.lower().removesuffix(".gz").removesuffix(".zst")
    if Path(source).is_file() and name.endswith(_TEXT_FILES):
        parts = [part.strip() for part in _BLANK_LINES.split(read_text(source, rules))]
        documents = tuple(part for part in parts if part)[:max_rows]
        said = f"{source}: {len(documents)} documents, parted by blank lines"
    else:
        reader = rows.read(source, max_rows=max_rows, rules=rules)
        examples, report = read_labelled(reader, dict(columns), require_label=False)
        documents = tuple(example.text for example in examples)
        said = f"{source}: {len(documents)} documents; {'; '.join(report.said)}; {account(report)}"
    if not documents:
        raise DataError([Fault(source, None, None, "text", "no text", "at least one document")])
    return Corpus(documents, said)


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
