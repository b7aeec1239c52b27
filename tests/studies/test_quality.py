"""What votes say about annotators and sources: counted by hand on a small study, and recovered from simulated people."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import UserError
from loopos.studies.events import Assignment
from loopos.studies.items import Item, Response
from loopos.studies.quality import quality, ranking, win_rate
from loopos.studies.study import Study
from tests.studies.study_makers import label_all, pair, prefers, study_in


def test_figures_by_hand(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", overlap=2) as study:
        study.add(
            [
                Item(
                    prompt=f"q{number}",
                    responses=(
                        Response(content="long answer", source="A", scores=(1.0, 0.5)),
                        Response(content="short", source="B", scores=(0.0, 0.0)),
                    ),
                )
                for number in range(4)
            ]
        )
        order: list[str] = []

        def ana(study: Study, assigned: Assignment) -> dict[str, Any]:
            order.append(assigned.item)
            return {**prefers("A")(study, assigned), "seconds": 10.0}

        def bo(study: Study, assigned: Assignment) -> dict[str, Any]:
            position = order.index(assigned.item)
            if position == 0:
                return {"choice": "tie", "seconds": 1.0}
            return {**prefers("A" if position == 1 else "B")(study, assigned), "seconds": 1.0}

        label_all(study, "ana", ana)
        label_all(study, "bo", bo)
        found = quality(study)
        assert (found.votes, found.ties) == (8, 1)
        # A is longer and has the higher reward; it won 5 of the 7 votes with a winner.
        assert found.longer is not None
        assert found.reward is not None
        assert (found.longer.count, found.longer.total) == (found.reward.count, found.reward.total) == (5, 7)
        assert found.left is not None
        votes = [vote for vote in study.votes() if vote.ballot.choice != "tie"]
        assert (found.left.count, found.left.total) == (sum(v.ballot.choice == "left" for v in votes), 7)
        # Ana says 1 1 1 1, Bo 1/2 1 0 0: they agree on 1 of 4, by chance on 1 · 1/4: κ = 0.
        assert found.cohen == {("ana", "bo"): pytest.approx(0)}
        # Of all 8 votes 5 are 1, 2 are 0 and 1 is a tie: P_e = 30/64, P = 1/4.
        assert found.fleiss == pytest.approx((1 / 4 - 30 / 64) / (1 - 30 / 64))
        # D_o = 6/8, D_e = 2 (5·2 + 5·1 + 2·1) / (8 · 7).
        assert found.alpha == pytest.approx(1 - (6 / 8) / (34 / 56))
        assert found.alpha_interval is None or found.alpha_interval[0] <= found.alpha <= found.alpha_interval[1]
        assert found.seconds == 5.5
        assert [(one.annotator, one.seconds, one.pace) for one in found.annotators] == [
            ("ana", 10.0, ""),
            ("bo", 1.0, "fast"),
        ]
        assert found.consistency is None
        ranked = ranking(study)
        assert ranked is not None
        assert ranked.fit is not None
        best = ranked.fit.strengths[0]
        assert (best.source, best.games, best.wins, best.ties) == ("A", 8, 5, 1)
        rate = win_rate(study, "A", "B")
        # Means of the items: 3/4, 1, 1/2, 1/2.
        assert (rate.trials, rate.rate, rate.state) == (4, 0.6875, "continue")
        assert win_rate(study, "B", "A").rate == pytest.approx(0.3125)
        with pytest.raises(UserError, match='got the source "C"; expected one of A, B'):
            win_rate(study, "A", "C")


def test_simulated_annotators_are_recovered(tmp_path: Path) -> None:
    """One annotator answers by the truth with 10% noise; another chooses left in 40% of the cases, whatever is there."""
    draw = random.Random(1)

    def careful(study: Study, assigned: Assignment) -> dict[str, Any]:
        better = "A" if draw.random() < 0.9 else "B"
        return prefers(better)(study, assigned)

    def biased(study: Study, assigned: Assignment) -> dict[str, Any]:
        return {"choice": "left"} if draw.random() < 0.4 else careful(study, assigned)

    with study_in(tmp_path / "s", 120, overlap=2, repeat_fraction=0.25) as study:
        label_all(study, "careful", careful)
        label_all(study, "lefty", biased)
        found = quality(study)
    first, second = found.annotators
    assert first.left is not None
    assert second.left is not None
    assert first.left.low < 0.5 < first.left.high
    # Left in 40%, and half of the rest.
    assert second.left.low < 0.7 < second.left.high
    assert second.left.low > 0.5
    assert first.consistency is not None
    assert second.consistency is not None
    # The same answer twice: 0.9² + 0.1².
    assert first.consistency.low < 0.82 < first.consistency.high
    assert second.consistency.rate < first.consistency.rate


def test_the_win_rate_is_decided_and_uses_the_random_sample(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", 20) as study:
        label_all(study, "ana", prefers("A"))
        found = win_rate(study, "A", "B")
        assert (found.state, found.winner, found.decided_after, found.trials) == ("decided", "a", 7, 20)
    with study_in(tmp_path / "t", 0, strategy="uncertainty", random_fraction=0.3) as study:
        study.add([pair(number, scores=((1.0,), (0.0,))) for number in range(30)])
        label_all(study, "ana", prefers("A"), 15)
        assert win_rate(study, "A", "B").trials == len(study.random_sample()) < 15
        ranked = ranking(study)
        assert ranked is not None
        assert ranked.fit is None
        assert "B never won or tied against A" in ranked.problem


def test_ratings_agree_by_intervals(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", mode="rating", overlap=2) as study:
        study.add([Item(prompt=f"q{number}", responses=(Response(content="a"),)) for number in range(5)])
        numbers = {item: 1 + position for position, item in enumerate(study.items)}
        label_all(study, "ana", lambda study, assigned: {"rating": numbers[assigned.item]})
        label_all(study, "bo", lambda study, assigned: {"rating": min(5, numbers[assigned.item] + 1)})
        found = quality(study)
    assert found.level == "interval"
    assert found.alpha is not None
    assert 0.7 < found.alpha < 0.9
    assert found.left is None
    assert found.fleiss is not None
    assert found.fleiss < 0.2
