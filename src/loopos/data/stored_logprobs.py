"""A teacher's log-probabilities in a file of rows: of each token of an answer the k most likely tokens at its place.

`loopos sample --logprobs` writes them beside prompt and answer, and distillation reads them: the token ids themselves,
because a text may be tokenized in another way than it was written, ids of candidates as base64 of little-endian int32
and log-probabilities of float16, `[L, k]` each, and a digest of the vocabulary. 20 candidates take 160 bytes a token.
Letters: L tokens of an answer.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.config.distillation import DistillationDataSection
from loopos.config.sft import SftDataSection
from loopos.data.reading import DataReport
from loopos.data.rows import Row
from loopos.data.step_format import StepFormat
from loopos.data.supervised_rows import Example
from loopos.data.supervised_tokens import (
    OVER_LENGTH,
    UNTRAINED,
    RowPolicy,
    Supervised,
    SupervisedEncoder,
    finish,
    over_length_diagnostic,
)

COLUMN = "teacher"
"""The column of a row that has them."""
_IDS, _VALUES = np.dtype("<i4"), np.dtype("<f2")


@dataclass(frozen=True)
class StoredLogprobs:
    """`prompt`, `completion`: token ids. `ids`: of candidates, `logprobs`: theirs in nats, `[L, k]` each, most likely
    first.
    """

    prompt: list[int]
    completion: list[int]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float16]

    def as_column(self, vocabulary: str) -> dict[str, Any]:
        """The column's value as JSON. vocabulary: as `vocabulary_digest`."""
        return {
            "prompt_ids": self.prompt,
            "completion_ids": self.completion,
            "k": int(self.ids.shape[1]),
            "top_ids": _text(self.ids.astype(_IDS)),
            "top_logprobs": _text(self.logprobs.astype(_VALUES)),
            "vocabulary": vocabulary,
        }

    @classmethod
    def of_row(cls, row: Row, tokenizer: PreTrainedTokenizerBase, vocabulary: str) -> StoredLogprobs:
        """What a row's column holds. vocabulary: that of `tokenizer`. Raises `DataError` for a row without it, with a
        broken one, or with that of another tokenizer.
        """
        value = row.values.get(COLUMN)
        if not isinstance(value, Mapping):
            actual = "no column" if value is None else type(value).__name__
            raise _refused(row, actual, "the teacher's log-probabilities", "write them with `loopos sample --logprobs`")
        if value.get("vocabulary") != vocabulary:
            expected = f"those of the student's ({len(tokenizer):,} tokens, digest {vocabulary})"
            hint = "student and teacher need the same tokenizer: set data.tokenizer, or sample from another teacher"
            raise _refused(row, f"tokens of another tokenizer (digest {value.get('vocabulary')})", expected, hint)
        try:
            prompt, completion = _ids(value["prompt_ids"]), _ids(value["completion_ids"])
            shape = (len(completion), int(value["k"]))
            ids = np.frombuffer(base64.b64decode(value["top_ids"], validate=True), _IDS).reshape(shape)
            logprobs = np.frombuffer(base64.b64decode(value["top_logprobs"], validate=True), _VALUES).reshape(shape)
        except (KeyError, TypeError, ValueError, binascii.Error) as problem:
            raise _refused(row, f"a broken value ({problem})", "a value of `loopos sample --logprobs`") from problem
        found = cls(prompt, completion, ids, logprobs)
        size = len(tokenizer)
        every = np.concatenate([np.asarray([*prompt, *completion]), ids.reshape(-1)])
        if not completion or every.min() < 0 or not bool((logprobs <= 0).all()):
            raise _refused(row, "no tokens, or values that are no log-probabilities", "those of an answer")
        # Candidates may be ids that no token has: vocabularies are padded.
        if max([*prompt, *completion]) >= size:
            raise _refused(row, f"token {max([*prompt, *completion])}", f"ids below {size}")
        return found


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 digits that two tokenizers share only if they have the same tokens under the same ids."""
    content = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _ids(value: Sequence[int]) -> list[int]:
    if not all(isinstance(each, int) for each in value):
        raise TypeError("ids are whole numbers")
    return list(value)


def _text(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def _refused(row: Row, actual: str, expected: str, hint: str = "") -> DataError:
    return DataError([Diagnostic(row.source_label, row.line, None, COLUMN, actual, expected, hint)])


class StoredEncoder(SupervisedEncoder):
    """Tokens of rows with stored log-probabilities: the ids themselves, of which the answer's are trained."""

    @cached_property
    def vocabulary(self) -> str:
        """The digest of the student's vocabulary."""
        return vocabulary_digest(self.tokenizer)

    def stored(self, row: Row) -> StoredLogprobs:
        """What a row holds. Raises `DataError` as `StoredLogprobs.of_row`."""
        return StoredLogprobs.of_row(row, self.tokenizer, self.vocabulary)

    def __call__(self, examples: Sequence[Example]) -> tuple[list[Supervised], DataReport]:
        """Raises `DataError` as `encode_supervised` and `StoredLogprobs.of_row`."""
        data, limit = self.data, self.max_length
        report = DataReport(read=len(examples), max_length=limit)
        rows: list[Supervised] = []
        dropped, over = Counter[str](), list[Diagnostic]()
        for index, example in enumerate(examples):
            found = self.stored(example.row)
            ids = [*found.prompt, *found.completion]
            # No token before the first one could predict it.
            mask = [position >= max(1, len(found.prompt)) for position in range(len(ids))]
            if limit is not None and len(ids) > limit:
                over.append(over_length_diagnostic(example.row, len(ids), limit, at_least=False))
                if data.over_length == "drop":
                    dropped[OVER_LENGTH] += 1
                    continue
                report.cut, report.tokens_cut = report.cut + 1, report.tokens_cut + len(ids) - limit
                ids, mask = ids[:limit], mask[:limit]
            if not any(mask):
                dropped[UNTRAINED] += 1
                continue
            rows.append(Supervised(ids, mask, None, index))
        report.lengths = [len(row.ids) for row in rows]
        report.tokens, report.trained_tokens = sum(report.lengths), sum(sum(row.mask) for row in rows)
        policy = RowPolicy(data.over_length, data.max_dropped_share, data.on_bad_row)
        finish(report, dropped, over, policy, "at least one row with a token to learn")
        return rows, report


def encoder_of(
    data: SftDataSection, step_format: StepFormat, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> SupervisedEncoder:
    """What tokenizes the rows of a config: for distillation without a teacher, rows with its log-probabilities. Raises
    `UserError` as `SupervisedEncoder`.
    """
    is_stored = isinstance(data, DistillationDataSection) and data.teacher is None
    return (StoredEncoder if is_stored else SupervisedEncoder)(data, step_format, tokenizer, max_length=max_length)
