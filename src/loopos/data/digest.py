"""SHA-256 digests of what training sees: encoded rows in order, and the tokenizer. Equal digests mean equal batches."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loopos.data.answer_batches import EncodedAnswer
from loopos.data.preference_tokens import EncodedComparison
from loopos.data.stepwise_tokens import EncodedStepwise
from loopos.data.tokens import Encoded


def rows_digest(rows: Iterable[Encoded], targets: Tensor | None = None) -> str:
    """Ids, segment ids and loss weights of examples in their order, and the targets. targets: of all examples."""
    digest = hashlib.sha256()
    for row in rows:
        types, weights = row.token_types or (), row.weights or ()
        digest.update(array("q", [len(row.ids), len(types), len(weights)]).tobytes())
        digest.update(array("i", row.ids).tobytes())
        digest.update(array("i", types).tobytes())
        digest.update(array("d", weights).tobytes())
    if targets is not None:
        digest.update(repr((targets.dtype, tuple(targets.shape))).encode())
        digest.update(targets.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def comparisons_digest(comparisons: Iterable[EncodedComparison]) -> str:
    """Prompts, responses, which tokens count, and pairs (better, worse, probability, margin) in their order."""
    digest = hashlib.sha256()
    for each in comparisons:
        texts = (each.prompt, *each.responses)
        digest.update(array("q", [len(texts), len(each.pairs), *map(len, texts)]).tobytes())
        for ids in texts:
            digest.update(array("i", ids).tobytes())
        for mask in each.masks or ():
            digest.update(array("b", mask).tobytes())
        for pair in each.pairs:
            digest.update(array("d", [pair.better, pair.worse, pair.probability, pair.margin]).tobytes())
    return digest.hexdigest()


def answers_digest(answers: Iterable[EncodedAnswer]) -> str:
    """Prompts, answers, thumbs, mismatched answers and which tokens count, in their order."""
    digest = hashlib.sha256()
    for each in answers:
        texts = (each.prompt, each.response, each.mismatched)
        digest.update(array("q", [each.desirable, *map(len, texts)]).tobytes())
        for ids in texts:
            digest.update(array("i", ids).tobytes())
        for mask in (each.mask, each.mismatched_mask):
            digest.update(array("b", mask or ()).tobytes())
    return digest.hexdigest()


def stepwise_digest(answers: Iterable[EncodedStepwise]) -> str:
    """Ids, step ends and labels in their order."""
    digest = hashlib.sha256()
    for each in answers:
        digest.update(array("q", [len(each.ids), len(each.ends), *each.ends]).tobytes())
        digest.update(array("i", each.ids).tobytes())
        # No label has the value −1.
        digest.update(array("d", [-1.0 if label is None else label for label in each.labels]).tobytes())
    return digest.hexdigest()


def prompts_digest(prompts: Iterable[Sequence[int]]) -> str:
    """Ids of prompts in their order."""
    digest = hashlib.sha256()
    for ids in prompts:
        digest.update(array("q", [len(ids)]).tobytes())
        digest.update(array("i", ids).tobytes())
    return digest.hexdigest()


def records_digest(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows of data, with all their columns, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        # Values of tables, such as dates, have no form in JSON.
        digest.update(json.dumps(dict(row), sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Which text each id stands for, and which ids are special. How text is split shows in the rows."""
    content = {"vocabulary": sorted(tokenizer.get_vocab().items()), "special": sorted(set(tokenizer.all_special_ids))}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def text_digest(text: str) -> str:
    """A text, such as a chat template."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
