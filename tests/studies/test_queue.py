"""The queue: overlap, leases, blind sides, repeats, strategies, and the random sample."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import UserError
from loopos.studies.events import Assignment
from loopos.studies.items import Item, Response
from loopos.studies.strategies import Diversity, disagreement, uncertainty
from loopos.studies.study import Study
from tests.studies.study_makers import Clock, label_all, pair, prefers, study_in


def test_each_item_gets_as_many_annotators_as_the_overlap(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", 20, overlap=2) as study:
        done = {who: label_all(study, who, prefers("A"), most) for who, most in (("ana", 12), ("bo", 99), ("cy", 99))}
        items = Counter(each.item for assigned in done.values() for each in assigned)
        assert set(items.values()) == {2}
        assert len(items) == 20
        for assigned in done.values():
            assert len({each.item for each in assigned}) == len(assigned)
        # Bo finished what Ana had begun before beginning others.
        assert {each.item for each in done["bo"][:12]} == {each.item for each in done["ana"]}
        progress = study.progress()
        assert (progress.votes, progress.target, progress.annotators) == (40, 40, 3)
        assert study.next_item("dee") is None


def test_a_lease_ends_and_the_item_goes_to_somebody_else(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", 1, lease=60.0) as study:
        first = study.next_item("ana")
        assert first is not None
        # The same until it is answered; nobody else gets it meanwhile.
        assert study.next_item("ana") == first
        assert study.next_item("bo") is None
        clock = study._clock
        assert isinstance(clock, Clock)
        clock.now += 60
        second = study.next_item("bo")
        assert second is not None
        assert second.item == first.item
        # A late vote is work that was done: it counts.
        study.vote(first.key, {"choice": "left"}, annotator="ana", key="a")
        study.vote(second.key, {"choice": "left"}, annotator="bo", key="b")
        assert study.progress().votes == 2
        with pytest.raises(UserError, match='annotator: got "bo"; the item was assigned to "ana"'):
            study.vote(first.key, {"choice": "left"}, annotator="bo", key="c")


def test_what_is_skipped_or_flagged_does_not_come_again(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", 3) as study:
        first = study.next_item("ana")
        assert first is not None
        study.skip(first.key, annotator="ana", key="s")
        second = study.next_item("ana")
        assert second is not None
        study.flag(second.item, "private data", annotator="ana", key="f")
        third = study.next_item("ana")
        assert third is not None
        assert len({first.item, second.item, third.item}) == 3
        study.vote(third.key, {"choice": "left"}, annotator="ana", key="v")
        assert study.next_item("ana") is None
        assert [each.item for each in label_all(study, "bo", prefers("A"))] == [first.item]
        assert study.progress().flagged == 1
        # Taken back, they come again; what an undo brings back comes first.
        study.undo("f", annotator="ana", key="u1")
        study.undo("v", annotator="ana", key="u2")
        again = study.next_item("ana")
        assert again is not None
        assert again.key == third.key


def test_a_vote_on_a_flagged_item_is_not_counted(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", 2) as study:
        label_all(study, "ana", lambda study, assigned: {"choice": "tie", "flag": "spam"}, 1)
        assert study.votes() == []
        assert (study.progress().votes, study.progress().target) == (0, 1)


def test_sides_are_random_by_the_seed_and_repeats_swap_them(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", 150, repeat_fraction=0.2) as study:
        assigned = label_all(study, "ana", prefers("A"))
    first = {each.item: each for each in assigned if not each.is_repeat}
    repeats = [each for each in assigned if each.is_repeat]
    assert len(first) == 150
    assert 50 < sum(each.left for each in first.values()) < 100
    # 150 of 80% are 187 in all.
    assert 20 < len(repeats) < 55
    assert len({each.item for each in repeats}) == len(repeats)
    assert all(each.left == 1 - first[each.item].left for each in repeats)
    order = [each.key for each in assigned]
    assert min(order.index(each.key) - order.index(first[each.item].key) for each in repeats) > 5
    with study_in(tmp_path / "again", 150, repeat_fraction=0.2) as study:
        same = label_all(study, "ana", prefers("A"))
    assert [(each.item, each.left, each.is_repeat) for each in same] == [
        (each.item, each.left, each.is_repeat) for each in assigned
    ]
    with study_in(tmp_path / "other", 20, repeat_fraction=0.2, seed=1) as study:
        assert [each.item for each in label_all(study, "ana", prefers("A"))][:20] != [each.item for each in same[:20]]


def test_a_target_ends_the_study(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", 10, target_votes=4) as study:
        assert len(label_all(study, "ana", prefers("A"))) == 4
        assert study.next_item("bo") is None


def scored(number: int, margins: tuple[float, ...]) -> Item:
    return pair(number, scores=(margins, tuple(0.0 for _ in margins)))


def test_disagreement_and_uncertainty_by_hand() -> None:
    log3 = 1.0986122886681098
    # σ(log 3) = 3/4: the models say 3/4 and 1/4, then 3/4 and 3/4, then 1/2 and 1/2.
    items = [scored(0, (log3, -log3)), scored(1, (log3, log3)), scored(2, (0.0, 0.0))]
    assert disagreement(items, []) == pytest.approx([0.25, 0, 0])
    assert uncertainty(items, []) == pytest.approx([0, -0.25, 0])
    with pytest.raises(UserError, match="got the rewards of 0 models; the strategy disagreement expects those of 2"):
        disagreement([pair(3)], [])


def test_diversity_takes_what_is_unlike_what_was_begun() -> None:
    def item(prompt: str, answer: str) -> Item:
        made = Item(prompt=prompt, responses=(Response(content=answer), Response(content=answer + "!")))
        return made.model_copy(update={"id": made.digest})

    begun = [item("how do I bake bread", "mix flour and water")]
    near, far = item("how do I bake a bread", "mix flour and water"), item("who was Ada Lovelace", "a mathematician")
    distances = Diversity()([near, far, begun[0]], begun)
    assert distances[2] == pytest.approx(0, abs=1e-6)
    assert 0 < distances[0] < 0.5 < distances[1]


def test_a_strategy_chooses_beside_the_random_fraction(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", strategy="uncertainty", random_fraction=0.3) as study:
        study.add([scored(number, (number / 10,)) for number in range(100)])
        assigned = label_all(study, "ana", prefers("A"), 60)
        chosen = [each for each in assigned if each.chosen_by == "uncertainty"]
        assert 8 <= sum(each.chosen_by == "random" for each in assigned) <= 30
        assert len(chosen) + sum(each.chosen_by == "random" for each in assigned) == 60
        margins = [study.items[each.item].margins[0] for each in chosen]
        assert margins == sorted(margins)


def most_margin(items: list[Item], begun: list[Item]) -> list[float]:
    """A strategy of a user."""
    return [item.margins[0] for item in items]


def too_short(items: list[Item], begun: list[Item]) -> list[float]:
    return [0.0]


def test_a_user_s_own_strategy_is_named_and_checked(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"random_fraction": 0.0}
    with study_in(tmp_path / "s", strategy=f"{__name__}:most_margin", **keys) as study:
        study.add([scored(number, (float(number),)) for number in range(5)])
        margins = [study.items[each.item].margins[0] for each in label_all(study, "ana", prefers("A"))]
        assert margins == [4, 3, 2, 1, 0]
    with (
        study_in(tmp_path / "t", 3, strategy=f"{__name__}:too_short", **keys) as study,
        pytest.raises(UserError, match=r"too_short: returned \[0.0\]; expected a list of 3 finite numbers"),
    ):
        study.next_item("ana")


def test_estimates_from_the_random_sample_are_unbiased_under_a_strategy(tmp_path: Path) -> None:
    """A wins the items with a positive margin, and the strategy takes those first: all votes, and also only those
    that were drawn at random from what it left, are biased; the random sample is not."""
    draw = random.Random(0)
    estimates: dict[str, list[float]] = {"sample": [], "all": [], "drawn": []}
    for seed in range(6):
        keys = {"strategy": f"{__name__}:most_margin", "random_fraction": 0.4, "seed": seed}
        with study_in(tmp_path / str(seed), **keys) as study:
            margins = [1.0] * 30 + [-1.0] * 70
            draw.shuffle(margins)
            study.add([scored(number, (margin + number / 1e6,)) for number, margin in enumerate(margins)])

            def by_margin(study: Study, assigned: Assignment) -> dict[str, Any]:
                better = 0 if study.items[assigned.item].margins[0] > 0 else 1
                return {"choice": "left" if assigned.left == better else "right"}

            assigned = label_all(study, "ana", by_margin, 60)
            wins = {vote.item: vote.preference for vote in study.votes()}
            sample, drawn = study.random_sample(), [each.item for each in assigned if each.chosen_by == "random"]
            assert set(drawn) <= set(sample) <= set(wins)
            for name, items in (("sample", sample), ("all", [*wins]), ("drawn", drawn)):
                estimates[name].append(statistics.fmean(wins[item] for item in items))
    means = {name: statistics.fmean(values) for name, values in estimates.items()}
    error = statistics.stdev(estimates["sample"]) / 6**0.5
    assert abs(means["sample"] - 0.3) < 3 * error
    assert error < 0.06
    assert means["all"] > 0.45
    assert means["drawn"] < 0.22


@pytest.mark.parametrize(
    ("ballot", "message"),
    [
        ({}, 'choice: got null; expected "left", "right", "tie" or "both_bad"'),
        ({"choice": "up"}, 'choice: got "up"; expected "left"'),
        ({"choice": "middle"}, 'ballot: choice: got "middle"; expected "left"'),
        ({"choice": "tie", "strength": 2}, "strength: got 2; expected nothing, unless one of two responses is better"),
        ({"choice": "left", "strength": 5}, "ballot: strength: got 5; expected 1, 2, 3, 4"),
        ({"choice": "tie", "edited": "x"}, 'edited: got "a text"; expected nothing'),
        ({"choice": "left", "rating": 3}, "rating: got 3.0; expected nothing: the mode is compare"),
        ({"choice": "left", "criteria": {"style": "left"}}, 'criteria: got "style"; expected "honesty"'),
        ({"choice": "left", "criteria": {"honesty": 3}}, 'criteria.honesty: got 3.0; expected "left"'),
        ({"choice": "left", "seconds": -1}, "ballot: seconds: got -1; expected a number >= 0"),
        ({"choice": "left", "notes": "x"}, 'ballot: notes: got the unknown key "notes"'),
    ],
)
def test_a_ballot_that_does_not_fit_is_refused(tmp_path: Path, ballot: dict[str, Any], message: str) -> None:
    with study_in(tmp_path / "s", 1, criteria=["honesty"]) as study:
        assigned = study.next_item("ana")
        assert assigned is not None
        with pytest.raises(UserError) as caught:
            study.vote(assigned.key, ballot, annotator="ana", key="k")
        assert message in str(caught.value)
        assert study.votes() == []


def test_ratings_are_on_the_scale_and_thumbs_up_or_down(tmp_path: Path) -> None:
    one = Item(prompt="p", responses=(Response(content="a"),))
    with study_in(tmp_path / "r", mode="rating", rating_scale=[0, 10], criteria=["style"]) as study:
        study.add([one, pair(1)])
        assert study.progress().waiting == 1
        assigned = study.next_item("ana")
        assert assigned is not None
        with pytest.raises(UserError, match=r"rating: got 11\.0; expected a number from 0 to 10"):
            study.vote(assigned.key, {"rating": 11}, annotator="ana", key="k")
        study.vote(assigned.key, {"rating": 7, "criteria": {"style": 3}}, annotator="ana", key="k")
        assert study.next_item("ana") is None
    with study_in(tmp_path / "t", mode="thumbs") as study:
        study.add([one])
        assigned = study.next_item("ana")
        assert assigned is not None
        with pytest.raises(UserError, match='choice: got "left"; expected "up" or "down"'):
            study.vote(assigned.key, {"choice": "left"}, annotator="ana", key="k")
        study.vote(assigned.key, {"choice": "up"}, annotator="ana", key="k")


def test_only_those_who_may_vote_get_items(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", 1, annotators=["ana", "bo"]) as study:
        with pytest.raises(UserError, match='annotator: got "cy"; expected "ana" or "bo"'):
            study.next_item("cy")
        assert study.next_item("bo") is not None
        with pytest.raises(UserError, match="annotator: got an empty name"):
            study.next_item(" ")
        with pytest.raises(UserError, match="key: got an empty text"):
            study.undo("x", annotator="ana", key="")


def test_an_item_can_be_requested(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", 1) as study:
        item = next(iter(study.items))
        assigned = study.request("ana", item)
        assert assigned.chosen_by == "requested"
        study.vote(assigned.key, {"choice": "tie"}, annotator="ana", key="k")
        assert study.next_item("ana") is None
        with pytest.raises(UserError, match='item: got "nothing"'):
            study.request("ana", "nothing")
