"""Calibration text: rows of tokens, all of one length.

Documents are concatenated with the end token between them and cut into rows, as in pretraining, so that there are no
pads. Apart from `pipeline`: this reads texts and knows no weights. Letters: N rows of L tokens.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.data import rows
from loopos.data.corpus import read_corpus
from loopos.data.rows import is_plain_text
from loopos.data.step_format import NAMED_FORMATS, StepFormat
from loopos.data.supervised_rows import read_supervised
from loopos.data.supervised_tokens import encode_supervised
from loopos.data.templates import ChatTemplate


@dataclass(frozen=True)
class Calibration:
    """`ids` `[N, L]` int64 on CPU. `summary`: what was read and drawn."""

    ids: Tensor
    summary: str


def read_calibration(
    source: str,
    columns: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_rows: int,
    num_tokens: int,
    seed: int,
    step_format: StepFormat = NAMED_FORMATS["think"],
) -> Calibration:
    """At most `num_rows` rows of `num_tokens` tokens, drawn with the seed from the whole text.

    The tokenizer's chat template and `step_format` render conversations and other training rows, as in training. A text
    shorter than one row gives one row of all its tokens. Raises `DataError` for a file that cannot be read or has fewer
    than two tokens.
    """
    # A tokenizer without an end token is an encoder's, which has no chat template.
    if is_plain_text(source) or tokenizer.eos_token_id is None:
        documents = read_corpus(source, columns).documents
        batch = tokenizer(list(documents), add_special_tokens=False, return_attention_mask=False, verbose=False)
        token_lists: list[list[int]] = [[*ids, *_end(tokenizer)] for ids in batch["input_ids"]]
    else:
        examples, _ = read_supervised(rows.read(source), columns, step_format=step_format)
        encoded, _ = encode_supervised(
            tokenizer, examples, step_format=step_format, max_length=None, template=ChatTemplate(tokenizer)
        )
        token_lists = [row.ids for row in encoded]
    draw = random.Random(seed)
    # Neighbors in a file are often alike: rows are cut from shuffled documents.
    draw.shuffle(token_lists)
    stream = [token for tokens in token_lists for token in tokens]
    if len(stream) < 2:
        raise DataError([Diagnostic(source, None, None, "text", f"{len(stream)} tokens", "at least two tokens")])
    length = min(num_tokens, len(stream))
    whole = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    chosen = sorted(draw.sample(range(len(whole)), min(num_rows, len(whole))))
    fewer = f", of {num_rows} requested" if len(chosen) < num_rows else ""
    summary = (
        f"calibration: {source}, {len(token_lists):,} documents, {len(stream):,} tokens; {len(chosen)} rows of "
        f"{length} tokens{fewer}, drawn with seed {seed}"
    )
    return Calibration(whole[torch.tensor(chosen)], summary)


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens between two documents; none if the tokenizer has no end token, as for encoders."""
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
