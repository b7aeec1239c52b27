"""Best-of-n: the best of several answers of the first policy, by the reward. What training has to beat.

Enters: several answers to each prompt, how they are scored, perhaps a judge. Leaves: for each n its KL, the expected
reward, and what the judge says of the answers chosen. After Stiennon et al. 2020 and Nakano et al. 2021. Left out: the
frontier's plot.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from loopos.evaluation.policy_metrics import best_of_n_expected, best_of_n_kl
from loopos.evaluation.rewards import Response

Judge = Callable[[Sequence[Response]], list[float]]


def best_of_n(
    answers: Sequence[Sequence[Response]], score: Judge, numbers: Sequence[int], judge: Judge | None
) -> list[dict[str, Any]]:
    """answers: for every prompt as many responses as the largest of `numbers`, or more. For each n: `kl`; `reward`: the
    expected score of the best of n, without bias; `judge`: its mean score of the best of each prompt's first n.
    """
    flat = [response for responses in answers for response in responses]
    scores = iter(score(flat))
    table = [[next(scores) for _ in responses] for responses in answers]
    found: list[dict[str, Any]] = []
    for n in numbers:
        told: dict[str, Any] = {"n": n, "kl": best_of_n_kl(n), "reward": best_of_n_expected(table, n)}
        if judge is not None:
            chosen = [
                responses[max(range(n), key=lambda place, scored=scored: scored[place])]  # type: ignore[misc]
                for responses, scored in zip(answers, table, strict=True)
            ]
            told["judge"] = statistics.fmean(judge(chosen))
        found.append(told)
    return found
