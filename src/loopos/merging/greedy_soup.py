"""Greedy soup: adds models to an average one after the other, by a metric on held-out rows.

Wortsman et al. 2022, "Model soups", recipe 1: models in falling order of their metric, each accepted only if the
average with it is no worse. Apart from `merge`: no other method measures models while it merges.
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
    """`members`: the soup after this step, as indices of models; `added`: the model tried; `value`: the metric with it;
    `accepted`: whether it stayed.
    """

    members: Sequence[int]
    added: int
    metric: str
    value: float
    accepted: bool

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
    """The steps of the soup. write: writes the models' average with these weights into a folder, for a trial; the
    folder is removed afterwards. Raises `UserError` for a metric that the models do not have.
    """
    data = recipe.validation_data
    assert data is not None, "checked with the recipe"
    folder = Path(recipe.output_dir)
    # A hidden name: if this process is killed, the next merge into the same folder removes it.
    path = hidden(folder, "partial")

    def measured(members: Sequence[int]) -> Mapping[str, float]:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            write(path, [float(number in members) for number in range(len(plan.models))])
            return row_metrics(str(path), data, device=device)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    single = [measured([number]) for number in range(len(plan.models))]
    metric = recipe.metric or usual_metric(single[0])
    if metric not in single[0]:
        raise UserError(
            f"metric: got {metric}; expected one of {', '.join(single[0])}, the metrics of these models on {data}"
        )
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    order = sorted(range(len(single)), key=lambda number: (-sign * single[number][metric], number))
    best = single[order[0]][metric]
    trials = [Trial([order[0]], order[0], metric, best, accepted=True)]
    for number in order[1:]:
        members = [*trials[-1].members, number]
        value = measured(members)[metric]
        accepted = sign * value >= sign * best
        trials.append(Trial(members if accepted else trials[-1].members, number, metric, value, accepted))
        best = value if accepted else best
        note(
            f"soup with {plan.models[number].location}: {metric} {value:.4g}, {'accepted' if accepted else 'rejected'}"
        )
    return trials
