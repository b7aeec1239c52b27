"""Examples → token ids. The only place where text becomes tokens.

Enters: `Labelled` examples and a tokenizer. Leaves: `Encoded` examples, and a report of what was cut. Left out:
batching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from loopos.config.faults import DataError, Fault, UserError
from loopos.data.formats import Labelled
from loopos.data.text_bounds import TextBound, spans

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

    def said(self) -> str:
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
    faults: list[Fault] = []
    report = TokenReport(max_length=max_length)
    bound = TextBound(tokenizer)
    # What is cut at its front keeps its end.
    wanted = max_length if tokenizer.truncation_side == "right" else None
    for first, last in spans([_size(example) for example in examples], _CHUNK):
        chunk = [_beginning(example, bound, wanted) for example in examples[first:last]]
        long = [_size(short) < _size(example) for short, example in zip(chunk, examples[first:last], strict=True)]
        whole = _tokenise(tokenizer, chunk, None)
        over = [i for i, ids in enumerate(whole["input_ids"]) if max_length is not None and len(ids) > max_length]
        if over:
            _check_room(tokenizer, chunk, max_length)
        near = [_near(chunk[i], examples[first + i], bound, wanted) for i in over]
        cut = dict(zip(over, _rows(_tokenise(tokenizer, near, max_length)), strict=True)) if over else {}
        for i, (ids, types) in enumerate(_rows(whole)):
            kept_ids, kept_types = cut.get(i, (ids, types))
            if not kept_ids:
                faults.append(
                    _fault(
                        chunk[i], "text without a single token", "text that the tokenizer turns into at least one token"
                    )
                )
            elif i in cut and on_truncation == "error":
                faults.append(
                    _fault(
                        chunk[i],
                        f"{'at least ' if long[i] else ''}{len(ids)} tokens",
                        f"at most {max_length} (training.max_length), since data.on_truncation is error",
                    )
                )
            encoded.append(Encoded(kept_ids, kept_types, first + i, len(ids) - len(kept_ids)))
            report.truncated += i in cut
            report.shortened += long[i]
    if faults:
        raise DataError(faults)
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
            f"training.max_length: given {max_length}, wanted at least {special + 1 + pairs}: this tokenizer adds "
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


def _fault(example: Labelled, given: str, wanted: str) -> Fault:
    return Fault(example.row.source, example.row.line, None, "text", given, wanted)
