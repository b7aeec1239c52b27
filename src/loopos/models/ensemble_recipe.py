"""What an ensemble of language models consists of, read from its folder. Apart from `language_ensemble`, so that
commands check a model without importing torch.

Enters: a path. Leaves: an `EnsembleRecipe`, or None where the folder holds no such ensemble.
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
    """`members`: places as `open_language_model` takes them. `weights`: one each, which sum to 1; without effect for a
    vote.
    """

    method: str
    members: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def votes(self) -> bool:
        """Whether answers are joined, and not distributions."""
        return self.method == VOTE


def read_ensemble(source: str | Path) -> EnsembleRecipe | None:
    """The recipe of a folder that `loopos ensemble` wrote of language models. Raises `UserError` for a broken one, or
    where a member is gone.
    """
    told = described(source).get(LANGUAGE_ENSEMBLE)
    if told is None:
        return None
    folder = model_folder(source)
    if not isinstance(told, dict) or told.get("method") not in LANGUAGE_METHODS:
        raise UserError(f"{source}: broken: no ensemble of a known method; make it again: loopos ensemble A B -o OUT")
    members, weights = told.get("members", []), told.get("weights", [])
    if len(members) != len(weights) or len(members) < 2 or not math.isclose(math.fsum(weights), 1.0, abs_tol=1e-6):
        raise UserError(f"{source}: broken: {len(members)} members and the weights {weights}, which must sum to 1")
    return EnsembleRecipe(told["method"], tuple(_place(folder, each) for each in members), tuple(map(float, weights)))


def refuse_votes(source: str, recipe: EnsembleRecipe | None) -> None:
    """Raises `UserError` where answers are joined and tokens are expected."""
    if recipe is not None and recipe.votes:
        raise UserError(
            f"{source}: an ensemble that votes over answers to problems, and gives no distribution over tokens; ask it "
            "with loopos evaluate or loopos generate, or join its members by --method mean"
        )


def described_members(names: Sequence[str], paths: Sequence[str | None]) -> list[dict[str, str]]:
    """Members as the description keeps them: a path relative to the ensemble's folder, or a name (of the embedded
    model, of a hub) as it was given where there is no path.
    """
    return [{"name": name} if path is None else {"path": path} for name, path in zip(names, paths, strict=True)]


def _place(folder: Path, member: Any) -> str:
    if "name" in member:
        return str(member["name"])
    path = folder / member["path"]
    if not path.exists():
        raise UserError(f"{folder}: its member {path} is gone; put it back, or make the ensemble again with --copy")
    return str(path)
