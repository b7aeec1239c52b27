"""Greedy soup: which models are averaged, chosen one after the other by a metric on held-out rows.

Enters: a recipe, its plan, and what writes the average of some of the models as a folder. Leaves: the trials, the last
of which is the soup. Wortsman et al. 2022, "Model soups", recipe 1: models in falling order of their metric, each kept
only if the average with it is no worse. Left out: averaging (`deploy.merge`), measuring (`deploy.quality`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loopos.config.diagnostics import UserError
from loopos.config.merge import MergeConfig
from loopos.evaluation.quality import LOWER_IS_BETTER, row_metrics, usual_metric
from loopos.merging.plan import Plan
from loopos.storage.whole_folder import hidden


@dataclass(frozen=True)
class Trial:
    """`members`: the soup after this step, as places among the models; `added`: the one that was tried; `value`: the
    metric with it; `kept`: whether it stayed.
    """

    members: Sequence[int]
    added: int
    metric: str
    value: float
    kept: bool

    def weights(self, number: int) -> list[float]:
        """The factor of each of `number` models: 1 for members."""
        return [float(index in self.members) for index in range(number)]


def choose(
    recipe: MergeConfig,
    plan: Plan,
    write: Callable[[Path, Sequence[float]], object],
    *,
    device: str,
    note: Callable[[str], None],
) -> list[Trial]:
    """The steps of the soup. write: makes a model folder of the models' average with these weights, for a trial; it is
    taken away again. Raises `UserError` for a metric that the models do not have.
    """
    data = recipe.validation_data
    assert data is not None, "checked with the recipe"
    folder = Path(recipe.output_dir)
    # The name of what is unfinished: if this process is killed, the next merge to the same place removes it.
    path = hidden(folder, "partial")

    def measured(members: Sequence[int]) -> Mapping[str, float]:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            write(path, [float(number in members) for number in range(len(plan.models))])
            return row_metrics(str(path), data, device=device)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    alone = [measured([number]) for number in range(len(plan.models))]
    metric = recipe.metric or usual_metric(alone[0])
    if metric not in alone[0]:
        raise UserError(f"metric: got {metric}; on {data} these models have {', '.join(alone[0])}")
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    order = sorted(range(len(alone)), key=lambda number: (-sign * alone[number][metric], number))
    best = alone[order[0]][metric]
    trials = [Trial([order[0]], order[0], metric, best, kept=True)]
    for number in order[1:]:
        members = [*trials[-1].members, number]
        value = measured(members)[metric]
        kept = sign * value >= sign * best
        trials.append(Trial(members if kept else trials[-1].members, number, metric, value, kept))
        best = value if kept else best
        note(f"soup with {plan.models[number].place}: {metric} {value:.4g}, {'kept' if kept else 'left out'}")
    return trials
