"""lm-eval tasks on our engine give the figures of lm-eval's own transformers model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.conftest import SENTENCES

pytest.importorskip("lm_eval", reason="needs the extra eval, which make test does not install: 32 packages of 150 MB")
pytest.importorskip("accelerate", reason="lm-eval's own model of transformers needs it")
# lm-eval and what it imports warn of their own futures.
pytestmark = pytest.mark.filterwarnings("ignore")

CHOICES = r"""task: pico_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: right
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = r"""task: pico_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
SAID = r"""task: pico_said
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/said.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: ["k", "\n\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
NAMES = ("pico_choices", "pico_texts", "pico_said")
RELATIVE = 1e-5


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """A folder of three tasks. Every second answer of pico_said is the model's greedy text."""
    from loopos.evaluation.reasoning import Reasoner
    from loopos.generation.settings import SamplingParams

    folder = tmp_path_factory.mktemp("tasks")
    for name, text in (("choices", CHOICES), ("texts", ROLLING), ("said", SAID)):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)), encoding="utf-8")
    rows = [
        {"question": SENTENCES[i], "choices": [SENTENCES[(i + j) % 10][: 8 + 9 * j] for j in (1, 2, 3)], "right": i % 3}
        for i in range(10)
    ]
    write(folder / "choices.jsonl", rows)
    # The last is longer than the 256 positions.
    write(folder / "texts.jsonl", [{"text": text} for text in (*SENTENCES[:4], " ".join(SENTENCES * 6))])
    engine = Reasoner.open(str(pico_folder)).engine
    settings = SamplingParams(max_new_tokens=12, stop=("k", "\n\n"))
    prompts = [engine.tokenizer.encode(sentence) for sentence in SENTENCES]
    summary = [each.text for each in engine.generate(prompts, settings)]
    answers = [text if i % 2 else "nothing" for i, text in enumerate(summary)]
    write(folder / "said.jsonl", [{"question": q, "answer": a} for q, a in zip(SENTENCES, answers, strict=True)])
    return folder


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def figures(found: dict[str, Any], name: str) -> dict[str, float]:
    return {key: value for key, value in found["results"][name].items() if isinstance(value, float)}


@pytest.mark.parametrize("shots", [0, 2])
def test_figures_are_those_of_lm_evals_own_model(tasks: Path, pico_folder: Path, shots: int) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loopos.evaluation.harness import EngineModel, run_tasks
    from loopos.evaluation.reasoning import Reasoner

    names, asked = NAMES[:1] if shots else NAMES, shots or None
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    theirs = HFLM(AutoModelForCausalLM.from_pretrained(pico_folder), tokenizer=tokenizer, batch_size=4, device="cpu")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(
        model=theirs, tasks=list(names), task_manager=manager, bootstrap_iters=0, num_fewshot=asked,
        fewshot_random_seed=1234,
    )  # fmt: skip
    ours = run_tasks(EngineModel(Reasoner.open(str(pico_folder))), names, folder=tasks, num_fewshot=asked)
    for name in names:
        assert len(figures(ours, name)) >= 1
        assert figures(ours, name) == pytest.approx(figures(expected, name), rel=RELATIVE)
        for one, other in zip(ours["samples"][name], expected["samples"][name], strict=True):
            assert one["doc"] == other["doc"]
            for mine, reference in zip(one["resps"], other["resps"], strict=True):
                assert len(mine) == 1
                first, second = mine[0], reference[0]
                if isinstance(first, tuple):
                    first, second = list(first), list(second)
                assert first == second or first == pytest.approx(second, rel=RELATIVE)
    if not shots:
        assert 0 < ours["results"]["pico_choices"]["acc,none"] < 1
        assert ours["results"]["pico_said"]["exact_match,none"] == 0.5


def test_an_ensemble_of_a_model_with_itself(tasks: Path, pico_folder: Path) -> None:
    from copy import deepcopy

    from loopos.evaluation.harness import EngineModel, run_tasks
    from loopos.evaluation.reasoning import Reasoner
    from loopos.models.language_ensemble import LanguageEnsemble

    alone = Reasoner.open(str(pico_folder))
    model = LanguageEnsemble((deepcopy(alone.model), deepcopy(alone.model)), (0.5, 0.5), "mean")  # type: ignore[arg-type]
    twice = Reasoner(model, alone.tokenizer, template=alone.template, step_format=alone.step_format)
    one, other = (run_tasks(EngineModel(each), NAMES, folder=tasks) for each in (alone, twice))
    for name in NAMES:
        assert figures(other, name) == pytest.approx(figures(one, name), rel=RELATIVE)


def test_the_command(tasks: Path, pico_folder: Path, tmp_path: Path) -> None:
    from loopos.cli.commands import app

    def invoke(*words: object) -> Any:
        return CliRunner().invoke(app, ["evaluate", str(pico_folder), *map(str, words), "--device", "cpu"])

    file = tmp_path / "documents.jsonl"
    words = ("--tasks", "pico_choices,pico_said", "--task-folder", tasks, "--limit", 4, "-o", file, "--json")
    result = invoke(*words)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert set(told["tasks"]) == {"pico_choices", "pico_said"}
    assert set(told["tasks"]["pico_choices"]) == {"acc", "acc_norm"}
    assert told["tasks"]["pico_said"] == {"exact_match": 0.5}
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert sorted(record["task"] for record in records) == ["pico_choices"] * 4 + ["pico_said"] * 4
    templated = invoke("--tasks", "pico_said", "--task-folder", tasks, "--limit", 2, "--chat")
    assert templated.exit_code == 0, templated.stderr
    assert "exact_match" in templated.stdout
