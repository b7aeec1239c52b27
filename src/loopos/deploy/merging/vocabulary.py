"""The vocabularies of a merge: compared, or united on request.

Enters: sources with their tokenizers. Leaves: faults that name the tokens that differ; or a `UnitedVocabulary`, with
the tokenizer that holds all tokens and the row of each token in each model. Left out: tensors without a row a token.
Letters: V tokens of the united vocabulary, d width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopos.config.faults import UserError
from loopos.deploy.merging.sources import Source
from loopos.models.sources import WeightsSource
from loopos.models.tokenizers import open_tokenizer
from loopos.models.vocabularies import vocabulary_difference
from loopos.storage.json_files import read_object

TOKENIZER = "tokenizer.json"
_NO_ROW = -1
# Parts of tokenizer.json that must be equal for tokens of two tokenizers to mean the same.
_RULES = ("normalizer", "pre_tokenizer", "decoder")


def tokens_of(source: Source) -> dict[str, int]:
    """Token → id. Raises `UserError` for a tokenizer that cannot be read."""
    file = source.folder / TOKENIZER
    if not file.is_file():
        place = WeightsSource(source.place, "folder", source.folder)
        return dict(open_tokenizer(place).get_vocab())
    content = _content(file)
    vocabulary = content["model"].get("vocab", {})
    if isinstance(vocabulary, list):
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}


def _content(file: Path) -> dict[str, Any]:
    content = read_object(file)
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{file}: describes no tokenizer")
    return content


def vocabulary_faults(sources: Sequence[Source]) -> list[str]:
    """A sentence for each model whose tokens differ from the first's, with the first few and their number. Models
    without a tokenizer are taken to have the right one.
    """
    known = [source for source in sources if source.has_tokenizer]
    if not known:
        return []
    first, faults = known[0], []
    own = tokens_of(first)
    for other in known[1:]:
        if _same_file(first.folder / TOKENIZER, other.folder / TOKENIZER):
            continue
        theirs = tokens_of(other)
        told = vocabulary_difference(own, theirs, first.place)
        if told:
            faults.append(
                f'{other.place}: other tokens than {first.place}: {told}; wanted one vocabulary, or tokenizer "union"'
            )
    return faults


def _same_file(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and (one.samefile(other) or one.read_bytes() == other.read_bytes())


@dataclass(frozen=True)
class UnitedVocabulary:
    """`tokenizer`: the content of its tokenizer.json. `rows`: for each source the row of every id `[V]`, −1 where it
    has none.
    """

    tokenizer: Mapping[str, Any]
    rows: Sequence[Tensor]

    @property
    def size(self) -> int:
        return len(self.rows[0])

    def united(self, tensors: Sequence[Tensor], sources: Sequence[int]) -> list[Tensor]:
        """Tensors with a row a token, one a source, each with V rows: its own where it has the token, else the mean of
        those of the models that have it. sources: their places among `rows`.
        """
        rows = [self.rows[place] for place in sources]
        absent = torch.stack([row == _NO_ROW for row in rows]).any(0).nonzero().squeeze(1)
        total = tensors[0].new_zeros((len(absent), *tensors[0].shape[1:]))
        count = torch.zeros(len(absent))
        found = []
        for tensor, row in zip(tensors, rows, strict=True):
            wide = tensor[row.clamp_min(0)]
            there = row[absent] != _NO_ROW
            total[there] += wide[absent[there]]
            count += there
            found.append(wide)
        mean = total / count.clamp_min(1).view(-1, *([1] * (total.ndim - 1)))
        for wide, row in zip(found, rows, strict=True):
            lacks = row[absent] == _NO_ROW
            wide[absent[lacks]] = mean[lacks]
        return found


def unite(sources: Sequence[Source]) -> UnitedVocabulary:
    """The vocabulary of all: ids of the first model stay, tokens of the others follow in their order, and merge rules
    of the others come after those before. Raises `UserError` for tokenizers that cut texts by other rules.
    """
    faults = [f"{each.place}: no {TOKENIZER}" for each in sources if not (each.folder / TOKENIZER).is_file()]
    if faults:
        raise UserError("\n".join([*faults, 'tokenizer "union" unites tokenizers that are kept in that file']))
    contents = [_content(source.folder / TOKENIZER) for source in sources]
    first = contents[0]
    for source, content in zip(sources[1:], contents[1:], strict=True):
        wrong = [name for name in _RULES if content.get(name) != first.get(name)]
        if content["model"].get("type") != first["model"].get("type"):
            wrong.insert(0, "model.type")
        if wrong:
            faults.append(
                f"{source.place}: its {TOKENIZER} differs from that of {sources[0].place} in {', '.join(wrong)}"
            )
    if faults:
        raise UserError("\n".join([*faults, "tokens that are cut by other rules cannot be united"]))
    ids = [tokens_of(source) for source in sources]
    for source, tokens in zip(sources, ids, strict=True):
        rows = int(source.text_config.get("vocab_size", 0))
        if tokens and max(tokens.values()) >= rows:
            faults.append(f"{source.place}: token {max(tokens.values())} has no row among the {rows} of its embedding")
    if faults:
        raise UserError("\n".join(faults))
    united = dict(ids[0])
    following = max(united.values(), default=-1) + 1
    for tokens in ids[1:]:
        for token in sorted(tokens, key=tokens.__getitem__):
            if token not in united:
                united[token] = following
                following += 1
    num_rows = max(following, int(sources[0].text_config.get("vocab_size", 0)))
    return UnitedVocabulary(
        _joined(contents, united), [_rows(tokens, united, num_rows, own=place == 0) for place, tokens in enumerate(ids)]
    )


def _rows(tokens: Mapping[str, int], united: Mapping[str, int], num_rows: int, *, own: bool) -> Tensor:
    """own: rows of the first model that no token has stay its own."""
    rows = torch.arange(num_rows) if own else torch.full((num_rows,), _NO_ROW)
    for token, number in united.items():
        rows[number] = tokens.get(token, _NO_ROW)
    return rows


def _joined(contents: Sequence[Mapping[str, Any]], united: Mapping[str, int]) -> dict[str, Any]:
    """The first tokenizer's content with the tokens and merge rules of all."""
    joined: dict[str, Any] = json.loads(json.dumps(contents[0]))
    model = joined["model"]
    added = {token["content"]: token for token in joined.get("added_tokens", [])}
    for content in contents[1:]:
        for token in content.get("added_tokens", []):
            added.setdefault(token["content"], {**token, "id": united[token["content"]]})
        pieces = content["model"].get("vocab", {})
        if isinstance(pieces, list):
            known = {piece for piece, _ in model["vocab"]}
            model["vocab"] += [[piece, score] for piece, score in pieces if piece not in known]
        else:
            for piece in sorted(pieces, key=pieces.__getitem__):
                model["vocab"].setdefault(piece, united[piece])
        if "merges" in model:
            have = {_pair(rule) for rule in model["merges"]}
            model["merges"] += [rule for rule in content["model"].get("merges", []) if _pair(rule) not in have]
    joined["added_tokens"] = sorted(added.values(), key=lambda token: int(token["id"]))
    return joined


def _pair(rule: Sequence[str] | str) -> tuple[str, ...]:
    """A merge rule, which older files hold as one text."""
    return tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule)
