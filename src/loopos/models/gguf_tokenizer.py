"""The tokenizer in a GGUF file. Apart from `gguf`, which is read before transformers is imported.

In: the metadata of a GGUF file with a byte-level BPE vocabulary whose way of splitting text is known here. Out: the
tokenizer that such a file was made from. The reader of transformers chooses the splitting by the architecture, not
by the file, and gives vocabularies without it a token <|endoftext|> that the model has no embedding for. Other
vocabularies (SentencePiece, WordPiece) are read by transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# GGUF's token types.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
SPLITS = {
    f"{_CONTRACTIONS}\\p{{N}}{_REST}": "qwen2",
    f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
}
"""The regular expression that splits text → llama.cpp's name of it."""
WHOLE_WORDS = frozenset({"llama-bpe"})
"""Pre-tokenizers under which llama.cpp takes a word that is itself a token whole, before any merge."""
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def unused_name(row: int) -> str:
    """The name of a row of the embedding beyond the vocabulary, which GGUF must give one."""
    return f"[PAD{row}]"


def gguf_tokenizer(summary: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a GGUF file by what it says, as `read_metadata` has it; None for a vocabulary of another kind,
    or split in a way that is not known here.
    """
    fields = {key.removeprefix("tokenizer."): value for key, value in summary.items() if key.startswith("tokenizer.")}
    steps = _pre_tokenizer(fields.get("ggml.pre"))
    if fields.get("ggml.model") != "gpt2" or steps is None:
        return None
    tokens = fields["ggml.tokens"]
    types = fields.get("ggml.token_type") or [NORMAL] * len(tokens)
    rows = [(row, token, kind) for row, (token, kind) in enumerate(zip(tokens, types, strict=True))]
    # llama.cpp's own way to fill rows up marks them as unused too.
    rows = [(row, token, kind) for row, token, kind in rows if (token, kind) != (unused_name(row), UNUSED)]
    described = {
        "version": "1.0",
        "added_tokens": [_added(row, token, kind) for row, token, kind in rows if kind in (CONTROL, USER_DEFINED)],
        "normalizer": {"type": "NFC"} if fields["ggml.pre"] == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "post_processor": _post_processor(fields, tokens),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "vocab": {token: row for row, token, _ in rows},
            "merges": [merge.split(" ") for merge in fields.get("ggml.merges", ())],
            "ignore_merges": fields["ggml.pre"] in WHOLE_WORDS,
        },
    }
    special = {name: fields.get(f"ggml.{key}_token_id") for key, name in _ROLES.items()}
    found: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        clean_up_tokenization_spaces=False,
        **{name: tokens[row] for name, row in special.items() if row is not None and row < len(tokens)},
    )
    found.chat_template = fields.get("chat_template")
    return found


def _pre_tokenizer(name: object) -> list[Mapping[str, Any]] | None:
    """What splits text, for llama.cpp's name of it."""
    if name == "gpt-2":
        return [_byte_level(use_regex=True)]
    if name == "smollm":
        return [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]
    pattern = next((pattern for pattern, each in SPLITS.items() if each == name), None)
    if pattern is None:
        return None
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


def _byte_level(*, use_regex: bool) -> Mapping[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _added(row: int, token: str, kind: int) -> Mapping[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": row, "content": token, "special": kind == CONTROL, **plain}


def _post_processor(fields: Mapping[str, Any], tokens: list[str]) -> Mapping[str, Any] | None:
    """What puts begin and end tokens around a text."""
    added = [key for key in ("bos", "eos") if fields.get(f"ggml.add_{key}_token")]
    around = {key: int(fields[name]) for key in added if (name := f"ggml.{key}_token_id") in fields}
    if not around:
        return None

    def framed(*names: str) -> list[Mapping[str, Any]]:
        parts: list[Mapping[str, Any]] = []
        for index, name in enumerate(names):
            ends = {key: [{"SpecialToken": {"id": tokens[row], "type_id": index}}] for key, row in around.items()}
            parts += [*ends.get("bos", ()), {"Sequence": {"id": name, "type_id": index}}, *ends.get("eos", ())]
        return parts

    special = {tokens[row]: {"id": tokens[row], "ids": [row], "tokens": [tokens[row]]} for row in around.values()}
    return {"type": "TemplateProcessing", "single": framed("A"), "pair": framed("A", "B"), "special_tokens": special}
