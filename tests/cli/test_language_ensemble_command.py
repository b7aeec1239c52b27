"""Ensembles of language models made by `loopos ensemble`, and the commands that open the folder as one model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from loopos.evaluation.reasoning import Reasoner
from loopos.serving.language import LanguageService
from loopos.serving.limits import ServingLimits
from loopos.serving.metrics import ServingMetrics
from tests.cli.conftest import Invoke, write_jsonl
from tests.serving.conftest import served

TEXT = "the parcel came late and the box was open. good value, works as described"


@pytest.fixture(scope="module")
def other_run(tmp_path_factory: pytest.TempPathFactory, language_run: Path) -> Path:
    """Another random model with the tokenizer and the marks of `language_run`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from loopos.models.folders import open_language_model, save_language_model

    opened = open_language_model(str(language_run))
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(language_run / "model"))
    folder = tmp_path_factory.mktemp("other") / "run"
    folder.mkdir()
    own = {name: value for name, value in opened.description.items() if name != "format"}
    save_language_model(folder / "model", model, opened.tokenizer, own)
    return folder


@pytest.fixture(scope="module")
def joined(language_run: Path, other_run: Path, tmp_path_factory: pytest.TempPathFactory, invoke: Invoke) -> Path:
    """A mean of both, measured on a text."""
    folder = tmp_path_factory.mktemp("joined")
    (folder / "held_out.txt").write_text(TEXT, encoding="utf-8")
    words = ("-o", folder / "mean", "--weight", 1, "--weight", 3, "--test", folder / "held_out.txt", "--device", "cpu")
    result = invoke("ensemble", language_run, other_run, *words)
    assert result.exit_code == 0, result.stderr
    assert "2 members combined by mean" in result.stdout
    return folder / "mean"


@pytest.fixture(scope="module")
def voting(language_run: Path, other_run: Path, tmp_path_factory: pytest.TempPathFactory, invoke: Invoke) -> Path:
    folder = tmp_path_factory.mktemp("voting") / "vote"
    result = invoke("ensemble", language_run, other_run, "-o", folder, "--method", "vote", "--copy")
    assert result.exit_code == 0, result.stderr
    return folder


def mixture(language_run: Path, other_run: Path) -> Any:
    """ids → log of the weighted mean of transformers' own distributions, `[T, V]`."""
    import torch
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(each / "model").eval() for each in (language_run, other_run)]

    def logprobs(ids: list[int]) -> Any:
        with torch.no_grad():
            first, second = (model(torch.tensor([ids])).logits[0].softmax(-1) for model in models)
        return (0.25 * first + 0.75 * second).log()

    return logprobs


def test_perplexity_is_that_of_the_mean(joined: Path, language_run: Path, other_run: Path, invoke: Invoke) -> None:
    from transformers import AutoTokenizer

    file = joined.parent / "held_out.txt"
    result = invoke("evaluate", joined, file, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["metrics"]["perplexity"]
    ids = AutoTokenizer.from_pretrained(language_run / "model")(TEXT)["input_ids"]
    logprobs = mixture(language_run, other_run)(ids)
    expected = math.exp(-sum(float(logprobs[index - 1, ids[index]]) for index in range(1, len(ids))) / (len(ids) - 1))
    assert found == pytest.approx(expected, rel=1e-4)
    report = (joined / "report.md").read_text(encoding="utf-8")
    assert f"{found:.4g}" in report
    recipe = json.loads((joined / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["weights"] == [0.25, 0.75]
    # The loss of rows goes another way.
    rows = write_jsonl(joined.parent / "rows.jsonl", [{"text": TEXT}])
    of_rows = json.loads(invoke("evaluate", joined, rows, "--device", "cpu", "--json").stdout)["metrics"]["loss"]
    logprobs = mixture(language_run, other_run)([*ids, 2])
    ids = [*ids, 2]
    total = -sum(float(logprobs[index - 1, ids[index]]) for index in range(1, len(ids)))
    assert of_rows == pytest.approx(total / (len(ids) - 1), rel=1e-4)


def test_generate_and_chat_use_the_mean(joined: Path, language_run: Path, other_run: Path, invoke: Invoke) -> None:
    words = ("--device", "cpu", "--temperature", 0, "--max-new-tokens", 8)
    result = invoke("generate", joined, "-p", "the film", "--json", *words)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    reasoner = Reasoner.open(str(language_run))
    ids, logprobs, total = reasoner.prompt("the film"), mixture(language_run, other_run), 0.0
    summary: list[int] = []
    while len(summary) < 8 and 2 not in summary:
        last = logprobs([*ids, *summary])[-1]
        summary.append(int(last.argmax()))
        total += float(last.max())
    assert told["text"] == reasoner.tokenizer.decode(summary, skip_special_tokens=True)
    assert told["logprob"] == pytest.approx(total, abs=1e-3)
    assert invoke("chat", joined, *words, text="the film\n").stdout == f"{told['text']}\n"
    solved = invoke("generate", joined, "-p", "the film", "--strategy", "self_consistency:3", "--json", *words[:2],
                    "--temperature", 1, "--max-new-tokens", 8)  # fmt: skip
    assert solved.exit_code == 0, solved.stderr


def test_it_is_served(joined: Path, invoke: Invoke) -> None:
    import openai

    limits, metrics = ServingLimits(), ServingMetrics()
    service = LanguageService(Reasoner.open(str(joined)), "both", limits, metrics)
    with served(service, limits, metrics) as server:
        client = server.client()
        answer = client.chat.completions.create(
            model="both", messages=[{"role": "user", "content": "the film"}], temperature=0, max_tokens=8
        )
        result = invoke("generate", joined, "-p", "the film", "--json", "--max-new-tokens", 8, "--device", "cpu")
        assert answer.choices[0].message.content == json.loads(result.stdout)["text"]
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="both", input="the film")


def test_answers_are_voted_on(
    voting: Path, language_run: Path, other_run: Path, tmp_path: Path, invoke: Invoke
) -> None:
    from loopos.config.keys import Strategy
    from loopos.evaluation.checkers import majority
    from loopos.generation.settings import SamplingParams

    settings = SamplingParams(temperature=1.0, max_new_tokens=12, seed=2)
    problems = ["where is it", "what is 2 + 2", "the box"]
    together = Reasoner.open(str(voting)).answer(problems, settings, strategy=Strategy("self_consistency", 3))
    alone = [
        Reasoner.open(str(run)).answer(problems, settings, strategy=Strategy("self_consistency", 3))
        for run in (language_run, other_run)
    ]
    marks = Reasoner.open(str(language_run)).step_format
    for found, first, second in zip(together, *alone, strict=True):
        chains = [*first.chains, *second.chains]
        assert [chain.text for chain in found.chains] == [chain.text for chain in chains]
        winner = majority([marks.parse(chain.text).answer for chain in chains])
        assert (found.chosen, found.confidence) == (winner if winner is not None else (None, 0.0))
    rows = [{"problem": problem, "reasoning": ["it is"], "answer": "4"} for problem in problems]
    file = write_jsonl(tmp_path / "problems.jsonl", rows)
    result = invoke("evaluate", voting, file, "--max-new-tokens", 8, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    assert {"accuracy", "confidence", "pass@2"} <= set(json.loads(result.stdout)["metrics"])
    summary = invoke("generate", voting, "-p", "where is it", "--max-new-tokens", 8, "--device", "cpu")
    assert summary.exit_code == 0, summary.stderr
    assert "of 2 chains agree" in summary.stdout


@pytest.mark.parametrize(
    ("words", "summary"),
    [
        (("chat",), "votes over answers"),
        (("serve", "--port", 0), "votes over answers"),
        (("generate", "-p", "x", "--raw", "-n", 2, "--temperature", 1), "--raw: "),
        (("generate", "-p", "x", "-n", 2, "--temperature", 1), "--strategy self_consistency:2"),
        (("export", "--format", "huggingface", "-o", "out"), ""),
    ],
)
def test_what_a_vote_cannot_provide(
    voting: Path, words: tuple[Any, ...], summary: str, tmp_path: Path, invoke: Invoke
) -> None:
    name, *rest = words
    rest = [tmp_path / each if each == "out" else each for each in rest]
    result = invoke(name, voting, *rest)
    assert result.exit_code == 2
    assert summary in result.stderr


def test_a_vote_has_no_loss(voting: Path, tmp_path: Path, invoke: Invoke) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}])
    assert "gives no distribution" in invoke("evaluate", voting, rows, "--device", "cpu").stderr
    (tmp_path / "held_out.txt").write_text(TEXT, encoding="utf-8")
    assert "gives no distribution" in invoke("evaluate", voting, tmp_path / "held_out.txt", "--device", "cpu").stderr


def test_mistakes_of_joining(
    language_run: Path, other_run: Path, joined: Path, trained: Any, project: Path, tmp_path: Path, invoke: Invoke
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    grown = tmp_path / "grown"
    tokenizer = AutoTokenizer.from_pretrained(language_run / "model")
    tokenizer.add_tokens(["<tool>"])
    model = AutoModelForCausalLM.from_pretrained(language_run / "model")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(grown)
    tokenizer.save_pretrained(grown)
    cases = [
        ((language_run, grown), 'other tokens than'),
        ((language_run, language_run), "the same model occurs twice"),
        ((language_run,), "got 1 model; expected two"),
        ((language_run, joined), "already an ensemble"),
        ((language_run, other_run, "--weight", 1), "--weight: got 1 for 2 models"),
        ((language_run, other_run, "--weight", 1, "--weight", -1), "--weight: got 1, -1; expected non-negative numbers"),
        ((language_run, other_run, "--method", "majority"), "--method: got majority; expected one of mean, logits, vote"),
        ((language_run, other_run, "--fit", "rows.jsonl"), "--fit: only for classifiers and regressors"),
        ((language_run, project / "outputs" / "first"), "a language model, which has no labels"),
    ]  # fmt: skip
    out = tmp_path / "out"
    for words, summary in cases:
        result = invoke("ensemble", *words, "-o", out)
        assert result.exit_code == 2, words
        assert summary in result.stderr
        assert not out.exists()
    assert "1 that" in invoke("ensemble", language_run, grown, "-o", out).stderr


def test_a_missing_member(language_run: Path, other_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(other_run / "model", moved)
    assert invoke("ensemble", language_run, moved, "-o", tmp_path / "out").exit_code == 0
    shutil.rmtree(moved)
    result = invoke("generate", tmp_path / "out", "-p", "x", "--device", "cpu")
    assert result.exit_code == 2
    assert "is missing; restore it" in result.stderr
