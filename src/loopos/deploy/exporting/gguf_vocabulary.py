"""A tokenizer as GGUF holds it: tokens with their types, merges, the name of the pre-tokenizer, special tokens.

Enters: a folder with tokenizer.json. Leaves: a `Vocabulary`. llama.cpp knows pre-tokenizers by name; the name is found
from what tokenizer.json itself does, and a tokenizer that does something else is refused, since the same text would
become other tokens. Left out: SentencePiece, Unigram and WordPiece vocabularies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from loopos.config.faults import UserError
from loopos.models.gguf_tokenizer import (
    CONTROL,
    NORMAL,
    SPLITS,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
    unused_name,
)


@dataclass(frozen=True)
class Vocabulary:
    """tokens, types: one for each row of the embedding. merges: "a b", in their order. pre: llama.cpp's name of the
    pre-tokenizer. special: GGUF's key (such as bos_token_id) → token. adds_bos, adds_eos: whether text gets them.
    template: the chat template, in Jinja.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    pre: str
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    template: str | None


def read_vocabulary(folder: Path, num_rows: int, given: str) -> Vocabulary:
    """The vocabulary for an embedding of `num_rows`. Raises `UserError` for a tokenizer that llama.cpp would not
    repeat.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{given}: no tokenizer.json; wanted a byte-level BPE tokenizer as transformers saves it")
    described = json.loads(file.read_text(encoding="utf-8"))
    pre = _pre_tokenizer(described, given)
    tokens, types = _tokens(described, num_rows, given)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    fast = Tokenizer.from_file(str(file))
    bare, whole = (fast.encode("a", add_special_tokens=added).ids for added in (False, True))
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        **_ends(folder),
    }
    adds_bos = whole[:1] == [tokenizer.bos_token_id] and bare[:1] != whole[:1]
    adds_eos = whole[-1:] == [tokenizer.eos_token_id] and bare[-1:] != whole[-1:]
    if len(whole) != len(bare) + adds_bos + adds_eos:
        raise UserError(f"{given}: its tokenizer puts more than begin and end tokens around a text, which GGUF lacks")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        # Of several, GGUF's one key holds the one that is taken where none is named.
        template = template.get("default")
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=merges,
        pre=pre,
        special={name: int(token) for name, token in special.items() if token is not None},
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        template=template if isinstance(template, str) else None,
    )


def _ends(folder: Path) -> dict[str, int]:
    """What ends a text, by the generation config: the first token is GGUF's end, another one its end of a turn."""
    file = folder / "generation_config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ends = [found] if isinstance(found, int) else list(found or ())
    return dict(zip(("eos_token_id", "eot_token_id"), ends, strict=False))


def _tokens(described: Mapping[str, Any], num_rows: int, given: str) -> tuple[list[str], list[int]]:
    by_id: dict[int, tuple[str, int]] = {place: (token, NORMAL) for token, place in described["model"]["vocab"].items()}
    for added in described.get("added_tokens", ()):
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise UserError(
                f"{given}: its token {added['content']} takes spaces around it or stands for whole words alone, which "
                "llama.cpp does not; export it with --format huggingface"
            )
        by_id[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if by_id and max(by_id) >= num_rows:
        raise UserError(f"{given}: its tokenizer has {max(by_id) + 1} tokens, its embedding {num_rows} rows")
    # Rows of the embedding beyond the vocabulary still need a name, each its own.
    listed = [by_id.get(place, (unused_name(place), UNUSED)) for place in range(num_rows)]
    return [token for token, _ in listed], [kind for _, kind in listed]


def _pre_tokenizer(described: Mapping[str, Any], given: str) -> str:
    """llama.cpp's name of what tokenizer.json does before merges."""
    model = described.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece" if model.get("byte_fallback") else model.get("type")
        raise _refusal(given, f"its vocabulary is {kind}")
    steps = _steps(described.get("pre_tokenizer"))
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _refusal(given, "it does not work on bytes, or puts a space before the first word")
    before = steps[:-1]
    name = None
    if not before and last.get("use_regex", True):
        name = "gpt-2"
    elif len(before) == 1 and _digits_apart(before[0]) and last.get("use_regex", True):
        name = "smollm"
    elif len(before) == 1 and before[0].get("type") == "Split" and not last.get("use_regex", True):
        pattern = before[0].get("pattern", {}).get("Regex")
        plain = before[0].get("behavior") == "Isolated" and not before[0].get("invert")
        name = SPLITS.get(pattern) if plain else None
    if name is None:
        raise _refusal(given, f"it splits text by {', '.join(str(step.get('type')) for step in steps)} in its own way")
    normalizer = described.get("normalizer")
    if normalizer is not None and not (name == "qwen2" and normalizer.get("type") == "NFC"):
        raise _refusal(given, f"it normalises text by {normalizer.get('type')}")
    if bool(model.get("ignore_merges")) != (name in WHOLE_WORDS):
        raise _refusal(given, f"ignore_merges is {bool(model.get('ignore_merges'))}, unlike that of {name}")
    return name


def _digits_apart(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "Digits" and bool(step.get("individual_digits"))


def _steps(described: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if described is None:
        return []
    if described.get("type") == "Sequence":
        return [step for part in described["pretokenizers"] for step in _steps(part)]
    return [described]


def _refusal(given: str, why: str) -> UserError:
    known = ", ".join(["gpt-2", "smollm", *SPLITS.values()])
    return UserError(
        f"{given}: its tokenizer is none that llama.cpp has a name for here: {why}; wanted a byte-level BPE that "
        f"splits text as one of {known} does: export it with --format huggingface"
    )
