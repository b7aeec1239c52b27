"""An ensemble opens as one model and combines the outputs of its members."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from pico_runs import class_rows, config_of, train, write_jsonl

import loopos
from loopos.config.diagnostics import UserError
from loopos.ensembling.ensemble import EnsembleResult, EnsembleSettings, combine
from loopos.evaluation.predictor import EnsemblePredictor
from loopos.models.folders import open_task_model

TEXTS = ["good film", "where is it", "bad order", "the lamp"]


def fine_tuned(folder: Path, weights: Path, rows: list[dict[str, Any]], seed: int, **model: Any) -> str:
    config = config_of(folder, weights, rows, model=model, training={"num_epochs": 1, "seed": seed})
    train(config)
    return str(folder)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> list[str]:
    """Three classifiers of the same labels, which training of different seeds and rows made different."""
    folder = tmp_path_factory.mktemp("members")
    return [
        fine_tuned(folder / f"m{seed}", pico_folder, class_rows(18 + 6 * seed, ("a", "b", "c")), seed)
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def regressors(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("regressors")
    rows = [{**row, "label": row["label"] * 10.0 + 0.5 + i % 2} for i, row in enumerate(class_rows(24))]
    return [fine_tuned(folder / f"r{seed}", pico_folder, rows[seed:], seed) for seed in range(2)]


@pytest.fixture
def labeled(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "held_out.jsonl", class_rows(21, ("a", "b", "c")))


def made(members: list[str], out: Path, **settings: Any) -> EnsembleResult:
    return combine(members, out, EnsembleSettings(**settings))


def probabilities(source: str | Path) -> Any:
    return numpy.array([list(each["probabilities"].values()) for each in loopos.load(source).predict(TEXTS)])


def test_the_mean_of_members_that_loopos_opens(members: list[str], tmp_path: Path) -> None:
    made(members, tmp_path / "all")
    each = numpy.stack([probabilities(member) for member in members])
    assert numpy.abs(each[0] - each[1]).max() > 1e-3
    found = loopos.load(tmp_path / "all").predict(TEXTS)
    for answer, mean, variance in zip(found, each.mean(0), each.var(0), strict=True):
        assert list(answer["probabilities"].values()) == pytest.approx(list(mean), abs=1e-9)
        assert answer["label"] == "abc"[mean.argmax()]
        assert answer["variance"] == pytest.approx(variance.mean(), abs=1e-12)
        assert answer["entropy"] == pytest.approx(-(mean * numpy.log(mean)).sum())
        assert 0 <= answer["mutual_information"] <= math.log(3)
    inside = -(each * numpy.log(each)).sum(2).mean(0)
    expected = [answer["entropy"] - one for answer, one in zip(found, inside, strict=True)]
    assert [answer["mutual_information"] for answer in found] == pytest.approx(expected, abs=1e-9)


def test_fitted_weights_are_the_likeliest_mixture(members: list[str], tmp_path: Path) -> None:
    """On the labels that member 1 gives itself."""
    summary = loopos.load(members[1]).predict([row["text"] for row in class_rows(30, ("a", "b", "c"))])
    rows = [{"text": row["text"], "label": one["label"]} for row, one in zip(class_rows(30), summary, strict=True)]
    joined = made(members, tmp_path / "all", method="weighted", fit=str(write_jsonl(tmp_path / "fit.jsonl", rows)))
    assert sum(joined.weights) == pytest.approx(1)
    mixed = numpy.tensordot(joined.weights, numpy.stack([probabilities(member) for member in members]), 1)
    assert probabilities(tmp_path / "all") == pytest.approx(mixed, abs=1e-9)
    [measured] = joined.measured
    # The fitted mixture is no worse than any member, nor than the plain mean, on the rows that it was fitted on.
    made(members, tmp_path / "mean")
    plain = EnsemblePredictor.open(tmp_path / "mean").evaluate_file(str(tmp_path / "fit.jsonl"))["log_loss"]
    best = min(*(alone["log_loss"] for alone in measured.by_member), plain)
    assert measured.together["log_loss"] <= best + 1e-9
    assert "optimistic" in (tmp_path / "all" / "report.md").read_text()


@pytest.mark.slow
def test_every_method_is_measured_as_a_single_model_is(members: list[str], tmp_path: Path, labeled: Path) -> None:
    for method in ("mean", "logits", "majority"):
        joined = made(members, tmp_path / method, method=method, test=str(labeled))
        [measured] = joined.measured
        again = loopos.load(tmp_path / method).evaluate_file(str(labeled))
        assert again == measured.together
        assert again["rows"] == 21
        assert sum(map(sum, again["confusion"])) == 21
        for place, alone in zip(members, measured.by_member, strict=True):
            single = loopos.load(place).evaluate_file(str(labeled))
            assert alone == {name: single[name] for name in alone}
        assert measured.mean["accuracy"] == pytest.approx(sum(a["accuracy"] for a in measured.by_member) / 3)
        report = (tmp_path / method / "report.md").read_text()
        assert "| mean of the members |" in report
        assert "| **ensemble** |" in report


def test_a_majority_reports_votes(members: list[str], tmp_path: Path) -> None:
    made(members[:2], tmp_path / "two", method="majority")
    single = [loopos.load(member).predict(TEXTS) for member in members[:2]]
    for number, answer in enumerate(loopos.load(tmp_path / "two").predict(TEXTS)):
        chosen = [each[number]["label"] for each in single]
        assert answer["votes"] == {name: chosen.count(name) for name in "abc"}
        assert answer["tied"] == ([] if chosen[0] == chosen[1] else sorted(chosen))
        assert answer["label"] in chosen


def test_values_are_averaged_with_their_spread(regressors: list[str], tmp_path: Path) -> None:
    made(regressors, tmp_path / "both")
    one, other = ([each["value"] for each in loopos.load(place).predict(TEXTS)] for place in regressors)
    for number, answer in enumerate(loopos.load(tmp_path / "both").predict(TEXTS)):
        assert answer["value"] == pytest.approx((one[number] + other[number]) / 2)
        assert answer["std"] == pytest.approx(abs(one[number] - other[number]) / 2, abs=1e-6)


def test_weights_of_regressors_are_found(regressors: list[str], tmp_path: Path) -> None:
    texts = [row["text"] for row in class_rows(24)]
    one, other = ([each["value"] for each in loopos.load(place).predict(texts)] for place in regressors)
    rows = [
        {"text": text, "label": 0.3 * a + 0.7 * b} for text, a, b in zip(texts, one, other, strict=True)
    ]  # fmt: skip
    fit = str(write_jsonl(tmp_path / "fit.jsonl", rows))
    joined = made(regressors, tmp_path / "both", method="weighted", fit=fit)
    assert joined.weights == pytest.approx([0.3, 0.7], abs=1e-3)


def test_classes_in_another_order_are_matched(members: list[str], tmp_path: Path) -> None:
    """A member whose head lists its classes backwards is the same member."""
    shutil.copytree(Path(members[0]) / "model", tmp_path / "turned")
    model, _, description = open_task_model(tmp_path / "turned")
    from safetensors.torch import save_file

    save_file({"weight": model.head.weight.detach().flip(0).contiguous()}, tmp_path / "turned" / "head.safetensors")
    space = description["label_space"]
    for name in ("class_names", "keys"):
        space[name] = space[name][::-1]
    description["class_names"] = description["class_names"][::-1]
    (tmp_path / "turned" / "loopos.json").write_text(json.dumps(description))
    (tmp_path / "turned" / "loopos-manifest.json").unlink()
    made([members[0], str(tmp_path / "turned")], tmp_path / "pair")
    assert probabilities(tmp_path / "pair") == pytest.approx(probabilities(members[0]), abs=1e-6)
    assert max(each["variance"] for each in loopos.load(tmp_path / "pair").predict(TEXTS)) < 1e-12


def test_copied_members_move_with_the_folder(members: list[str], tmp_path: Path) -> None:
    made(members[:2], tmp_path / "first" / "all", copy=True)
    expected = probabilities(tmp_path / "first" / "all")
    (tmp_path / "first").rename(tmp_path / "second")
    assert (probabilities(tmp_path / "second" / "all") == expected).all()
    told = json.loads((tmp_path / "second" / "all" / "loopos.json").read_text())
    assert told["ensemble"]["members"] == ["members/1", "members/2"]


def test_a_missing_member_is_reported(members: list[str], tmp_path: Path) -> None:
    shutil.copytree(members[0], tmp_path / "mine")
    made([members[1], str(tmp_path / "mine")], tmp_path / "all")
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(UserError, match="mine/model is missing"):
        loopos.load(tmp_path / "all")


def check_refused(told: str, actual: list[str], out: Path, **settings: Any) -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=told):
        made(actual, out, **settings)
    assert sorted(out.parent.iterdir()) == before


def test_what_cannot_form_an_ensemble_is_refused(
    members: list[str], regressors: list[str], tmp_path: Path, labeled: Path, pico_folder: Path
) -> None:
    out = tmp_path / "out"
    other = fine_tuned(tmp_path / "other", pico_folder, class_rows(18, ("a", "b", "d")), 1)
    check_refused(r"other labels than .*: d only here, c only there", [members[0], other], out)
    check_refused("of task regression, .* of task classification", [members[0], regressors[0]], out)
    check_refused("got 1 model", members[:1], out)
    check_refused("occurs twice", [members[0], members[0]], out)
    check_refused("--method: got median", members, out, method="median")
    check_refused("add --fit DATA", members, out, method="weighted")
    check_refused("--fit: fits weights", members, out, method="mean", fit=str(labeled))
    check_refused("expected one of mean, weighted", regressors, out, method="majority")
    check_refused("no trained model here", [members[0], str(tmp_path)], out)
    made(members[:2], tmp_path / "pair")
    check_refused("already an ensemble", [str(tmp_path / "pair"), members[2]], out)
    check_refused("which exists", members, tmp_path / "pair")


def test_an_ensemble_is_no_single_model(members: list[str], tmp_path: Path) -> None:
    made(members[:2], tmp_path / "pair")
    with pytest.raises(UserError, match="an ensemble of several models"):
        open_task_model(tmp_path / "pair")


def test_rows_that_one_member_drops_are_noted(pico_folder: Path, tmp_path: Path) -> None:
    """A table of figures has those that every member has; what is dropped is said, and stands among the ensemble's."""
    shutil.copytree(pico_folder, tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    texts = ["the box was open", "my card was charged twice for one order and the parcel came late " * 2]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    made = combine([str(pico_folder), str(tmp_path / "short")], tmp_path / "out", EnsembleSettings(test=str(rows)))
    [measured] = made.measured
    assert ["dropped_rows" in each for each in [*measured.by_member, measured.together]] == [False, True, True]
    assert measured.ensemble["dropped_rows"] == 1
    assert list(measured.mean) == ["loss", "perplexity"]
    assert [note.split(" exceed")[0] for note in made.notes] == [
        f"{rows}: 1 rows",
        f"{rows}: 1 rows",
    ]
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("exceed the positions of") == 2
    assert "| mean of the members |" in report


def test_settings_of_the_other_kind_are_refused(members: list[str], pico_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(pico_folder, tmp_path / "copy")
    language = [str(pico_folder), str(tmp_path / "copy")]
    check_refused("--weight: only for language models", members, tmp_path / "out", weights=(1.0, 2.0, 3.0))
    check_refused("--fit: only for classifiers and regressors", language, tmp_path / "out", fit="rows.jsonl")
    check_refused("--columns: only for classifiers", language, tmp_path / "out", columns={"text": "a"})
    check_refused("got majority; expected one of mean, logits, vote", language, tmp_path / "out", method="majority")
    check_refused("a language model, which has no labels", [members[0], language[0]], tmp_path / "out")
