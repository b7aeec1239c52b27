"""Grammars over tokens: which tokens may come next so that a text is JSON of a schema. llguidance does the work.

A grammar is the state of one completion. Rows with different grammars, and rows without, decode in one batch.
Letters: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.extras import install_command

ANY_OBJECT = '{"type": "object"}'
"""The schema of any object."""


# As json.dumps writes it: with free white space, a model may write nothing but white space up to its limit.
_SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes grammars for one tokenizer. The tokenizer's tables are built once for each set of end tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._tables: dict[frozenset[int], Any] = {}

    def begin(self, schema: str, ends: frozenset[int]) -> Grammar:
        """A grammar at its start. schema: JSON Schema as JSON text. ends: tokens that end a completion. Raises
        `UserError` for a schema that cannot be followed, and `MissingRequirement` without llguidance.
        """
        try:
            import llguidance
        except ImportError as problem:
            message = f"a JSON schema needs llguidance, which is not installed; run {install_command('grammar')}"
            raise MissingRequirement(message) from problem
        try:
            source = llguidance.LLMatcher.grammar_from_json_schema(schema, _SEPARATORS)
        except ValueError as problem:
            raise UserError(f"the JSON schema cannot be read: {_first_line(problem)}; expected an object") from problem
        if ends not in self._tables:
            self._tables[ends] = self._table(ends)
        matcher = llguidance.LLMatcher(self._tables[ends], source, log_level=0)
        if matcher.is_error():
            raise UserError(f"the JSON schema cannot be followed: {_first_line(matcher.get_error())}")
        return Grammar(matcher)

    def _table(self, ends: frozenset[int]) -> Any:
        import llguidance.hf

        try:
            return llguidance.hf.from_tokenizer(
                self._tokenizer,
                n_vocab=max(self._vocab_size, len(self._tokenizer)),
                eos_token=sorted(ends),
            )
        except ValueError as problem:
            raise UserError(
                f"a JSON schema cannot be followed with this tokenizer: {_first_line(problem)}"
            ) from problem


class Grammar:
    """The state of one completion."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, vocab_size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """`[V]` bool, True = the token may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        found = np.unpackbits(bits, bitorder="little").astype(bool)[:vocab_size]
        return np.pad(found, (0, vocab_size - len(found)))

    def take(self, token: int) -> None:
        """Advances by a token that was allowed."""
        if not self._matcher.consume_token(token):
            raise UserError(f"the grammar of a completion failed: {_first_line(self._matcher.get_error())}")


def allowed_tokens(grammars: Sequence[Grammar | None], vocab_size: int, device: torch.device) -> Tensor:
    """`[B, V]` bool, True = the token may come next; all of them for a row without a grammar."""
    rows = [np.ones(vocab_size, dtype=bool) if grammar is None else grammar.allowed(vocab_size) for grammar in grammars]
    return torch.from_numpy(np.stack(rows)).to(device)


def _first_line(problem: object) -> str:
    return (str(problem).splitlines() or [""])[0]
