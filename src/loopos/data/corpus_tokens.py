"""Documents for pretraining → a tokenizer → pieces of tokens.

Enters: documents. Leaves: a byte-level BPE tokenizer trained on them, `Encoded` pieces. Left out: how documents are
read (`corpus`), batches, the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loopos.data.text_bounds import spans
from loopos.data.tokens import Encoded

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
