"""The recipe of an ensemble of language models, read from its folder. Separate from `language_ensemble`, so that
commands check a model without importing torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopos.config.diagnostics import UserError
from loopos.models.model_folder import LANGUAGE_ENSEMBLE, described, model_folder

VOTE = "vote"
LANGUAGE_METHODS: tuple[str, ...] = ("mean", "logits", VOTE)


@dataclass(frozen=True)
class EnsembleRecipe:
    """`members`: sources for `open_language_model`. `weights`: one per member, sum to 1; unused for a vote."""

    method: str
    members: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def votes(self) -> bool:
        """Whether the ensemble votes over answers instead of mixing distributions."""
        return self.method == VOTE


def read_ensemble(source: str | Path) -> EnsembleRecipe | None:
    """The recipe of a folder that `loopos ensemble` wrote for language models; None for another folder. Raises
    `UserError` for a broken recipe or a missing member.
    """
    recipe = described(source).get(LANGUAGE_ENSEMBLE)
    if recipe is None:
        return None
    folder = model_folder(source)
    if not isinstance(recipe, dict) or recipe.get("method") not in LANGUAGE_METHODS:
        raise UserError(f"{source}: broken: unknown ensemble method; make it again: loopos ensemble A B -o OUT")
    members, weights = recipe.get("members", []), recipe.get("weights", [])
    if len(members) != len(weights) or len(members) < 2 or not math.isclose(math.fsum(weights), 1.0, abs_tol=1e-6):
        raise UserError(f"{source}: broken: {len(members)} members and the weights {weights}, which must sum to 1")
    return EnsembleRecipe(
        recipe["method"], tuple(_member_path(folder, each) for each in members), tuple(map(float, weights))
    )


def refuse_votes(source: str, recipe: EnsembleRecipe | None) -> None:
    """Raises `UserError` for an ensemble that votes, where token probabilities are needed."""
    if recipe is not None and recipe.votes:
        raise UserError(
            f"{source}: an ensemble that votes over answers to problems, and gives no distribution over tokens; use "
            "loopos evaluate or loopos generate, or combine its members with --method mean"
        )


def described_members(names: Sequence[str], paths: Sequence[str | None]) -> list[dict[str, str]]:
    """Members as the description stores them: a path relative to the ensemble's folder, or a name (embedded model, hub
    id).
    """
    return [{"name": name} if path is None else {"path": path} for name, path in zip(names, paths, strict=True)]


def _member_path(folder: Path, member: Any) -> str:
    if "name" in member:
        return str(member["name"])
    path = folder / member["path"]
    if not path.exists():
        raise UserError(f"{folder}: its member {path} is gone; put it back, or make the ensemble again with --copy")
    return str(path)
