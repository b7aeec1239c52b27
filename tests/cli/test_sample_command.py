"""`loopos sample` on pico models: judges, what is kept, what its file trains, and what a kill costs."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from killed_runs import NUM_KILLS, digest, in_a_child
from pico_runs import slow_but

from loopos.cli import sample as command
from loopos.cli import sample_options
from loopos.evaluation.checkers import NAMES
from loopos.evaluation.policy_metrics import best_of_n_kl
from loopos.rl.rejection_sampling import RESPONSES, SCORES
from loopos.rl.selection import PAIR_RULES, SELECTIONS
from loopos.storage.chunked_lines import ChunkedLines
from tests.cli.conftest import Invoke, write_jsonl

WORDS = ("--device", "cpu", "--max-new-tokens", 8, "--seed", 3)
PROMPTS = [{"prompt": f"where is parcel {i}", "answer": str(i), "topic": "parcels"} for i in range(7)]
JUDGES = '''
def longest(prompts, responses):
    """The number of characters."""
    return [float(len(response)) for response in responses]


def of_rows(prompts, responses, rows):
    """Long responses to even answers, short ones to odd."""
    return [len(text) * (1.0 if int(row["answer"]) % 2 == 0 else -1.0) for text, row in zip(responses, rows)]


def broken(prompts, responses):
    if any("parcel 4" in prompt for prompt in prompts):
        raise ValueError("no such parcel")
    return [float(len(response)) for response in responses]
'''


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of judge functions, with a name of its own for each test: modules are imported once."""
    name = f"sample_judges_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(JUDGES, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)


Sampled = Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]


@pytest.fixture
def sampled(language_run: Path, prompts: Path, tmp_path: Path, invoke: Invoke) -> Sampled:
    """Runs the command on `source`; the rows of its file, and its figures."""

    def run(*words: object, source: Path = prompts, name: str = "rows.jsonl") -> Any:
        result = invoke("sample", language_run, source, "-o", tmp_path / name, *words, *WORDS, "--json")
        assert result.exit_code == 0, result.stderr
        assert not (tmp_path / f"{name}.progress").exists()
        return rows_of(tmp_path / name), json.loads(result.stdout)

    return run


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def text_of(response: list[dict[str, str]]) -> str:
    (message,) = response
    assert message["role"] == "assistant"
    return message["content"]


def by_prompt(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each of the prompts; blank responses have none."""
    grouped: dict[str, list[dict[str, Any]]] = {each["prompt"]: [] for each in PROMPTS}
    for row in rows:
        grouped[row["prompt"][0]["content"]].append(row)
    return list(grouped.values())


def test_the_names_of_options_are_those_of_the_tables() -> None:
    assert tuple(SELECTIONS) == sample_options.KEEP
    assert PAIR_RULES == sample_options.PAIRS
    assert set(NAMES) == sample_options.CHECKERS


def test_without_a_judge_it_samples_as_generate_does(
    sampled: Sampled, language_run: Path, prompts: Path, tmp_path: Path, invoke: Invoke
) -> None:
    rows, figures = sampled("-n", 3, "--keep", "all")
    file = tmp_path / "generated.jsonl"
    words = ("--input", prompts, "-n", 3, "--temperature", 1, "-o", file, *WORDS)
    assert invoke("generate", language_run, *words).exit_code == 0
    generated = rows_of(file)
    assert [text_of(row["completion"]) for row in rows] == [each["text"] for each in generated]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": each["prompt"]}] for each in generated]
    assert [row["tokens"] for row in rows] == [each["tokens"] for each in generated]
    assert rows[4] == {**rows[4], "sample": 1, "row": {"answer": "1", "topic": "parcels"}}
    assert (figures["prompts"], figures["responses"], figures["rows"]) == (7, 21, 21)
    assert not {"mean_score", "pass@1", "score"} & ({*figures} | {*rows[0]})


def test_chunks_change_nothing_and_repeated_prompts_are_dropped(sampled: Sampled, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "twice.jsonl", [*PROMPTS, PROMPTS[2], {"prompt": "my card " * 300}])
    whole, figures = sampled("-n", 2, "--keep", "all", source=source)
    assert figures["dropped"] == {"same prompt again": 1, command.NO_ROOM: 1}
    for chunk in (1, 3):
        assert sampled("-n", 2, "--keep", "all", "--chunk", chunk, source=source)[0] == whole


def test_best_is_the_response_with_the_highest_score(sampled: Sampled, judges: str) -> None:
    words = ("-n", 4, "--judge", f"{judges}:longest", "--stop", "e")
    every, figures = sampled(*words, "--keep", "all")
    texts = [[text_of(row["completion"]) for row in some] for some in by_prompt(every)]
    assert 0 < figures["blank"] == (28 - len(every)) / 28
    means, most = [sum(map(len, some)) / 4 for some in texts], [max(map(len, some)) for some in texts]
    assert figures["mean_score"] == pytest.approx(sum(means) / 7)
    assert figures["best_of@4"] == pytest.approx(sum(most) / 7)
    assert figures["score_length_correlation"] > 0.5
    rows, figures = sampled(*words, "--allow-cut")
    assert [row["messages"] for row in rows] == [
        [{"role": "user", "content": each["prompt"]}, {"role": "assistant", "content": max(some, key=len)}]
        for each, some in zip(PROMPTS, texts, strict=True)
    ]
    assert [row["score"] for row in rows] == most
    assert figures["best_of_n_kl"] == best_of_n_kl(4)
    assert figures["chosen_tokens"] > figures["rejected_tokens"]
    # Cut responses are not learned unless the option allows it: they would teach to stop in the middle.
    ended, figures = sampled(*words)
    whole = [[text_of(row["completion"]) for row in some if row["ended"]] for some in by_prompt(every)]
    assert [row["messages"][1]["content"] for row in ended] == [max(some, key=len) for some in whole if some]
    assert [row["score"] for row in ended] != most


def test_a_function_takes_the_rows_and_pairs_have_its_margin(sampled: Sampled, judges: str) -> None:
    words = ("-n", 4, "--keep", "pairs", "--judge", f"{judges}:of_rows", "--allow-cut")
    rows, figures = sampled(*words)
    for row in rows:
        chosen, rejected = (len(text_of(row[side])) for side in ("chosen", "rejected"))
        assert chosen > rejected if int(row["row"]["answer"]) % 2 == 0 else chosen < rejected
        assert row["margin"] == abs(chosen - rejected) == row["score_chosen"] - row["score_rejected"]
    assert len(rows) == figures["rows"] == 7 - round(figures["no_signal"] * 7) > 3
    most = max(row["margin"] for row in rows)
    assert [row["margin"] for row in sampled(*words, "--min-margin", most)[0]] == [most] * sum(
        row["margin"] == most for row in rows
    )
    every = sampled(*words, "--pairs", "all")[0]
    assert len(every) > len(rows)
    drawn = sampled(*words, "--pairs", "random")[0]
    assert [row["chosen"] for row in drawn] == [row["chosen"] for row in rows]
    assert drawn == sampled(*words, "--pairs", "random")[0] != rows


def test_a_reward_function_takes_options_and_numbers_of_tokens(sampled: Sampled) -> None:
    options = '{"minimum": 3, "soft": 4}'
    rows, _ = sampled("-n", 2, "--keep", "all", "--judge", "length_window", "--judge-options", options)
    found = sorted({row["score"] for row in rows})
    assert set(found) <= {-0.75, -0.5, -0.25, 0.0}
    assert found[-1] == 0.0


def test_a_checker_compares_with_the_row_s_answer(sampled: Sampled, tmp_path: Path) -> None:
    every, _ = sampled("-n", 4, "--keep", "all", "--stop", "e")
    # Of the first two prompts one response is the expected answer, of the others none.
    answers = [*(text_of(some[1]["completion"]) for some in by_prompt(every)[:2]), *["nothing of this kind"] * 5]
    rows = [{"prompt": row["prompt"], "answer": answer} for row, answer in zip(PROMPTS, answers, strict=True)]
    source = write_jsonl(tmp_path / "answers.jsonl", rows)
    kept, figures = sampled("-n", 4, "--keep", "all", "--stop", "e", "--judge", "exact", "--allow-cut", source=source)
    right = [sum(row["label"] for row in some) for some in by_prompt(kept)]
    assert right[0] >= 1 <= right[1]
    assert right[2:] == [0] * 5
    assert figures["pass@4"]["rate"] == 2 / 7
    assert figures["pass@1"]["rate"] == pytest.approx(sum(right) / 28) == figures["mean_score"]
    assert figures["pass@4"]["low"] < 2 / 7 < figures["pass@4"]["high"]
    best, _ = sampled("-n", 4, "--stop", "e", "--judge", "exact", "--allow-cut", source=source)
    assert [row["messages"][0]["content"] for row in best] == [row["prompt"] for row in PROMPTS[:2]]
    assert best[0]["messages"][1]["content"] == next(
        text_of(row["completion"]) for row in kept if row["label"] and row["prompt"][0]["content"].endswith(" 0")
    )


def test_a_judge_model_grades_by_the_probability_of_yes(sampled: Sampled, language_run: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "grading.txt").write_text("{prompt} of {topic}: {response} good?", encoding="utf-8")
    words = ("-n", 2, "--keep", "all", "--judge-model", language_run, "--grading-prompt", tmp_path / "grading.txt")
    rows, figures = sampled(*words, "--grades", "love,rude")
    model = AutoModelForCausalLM.from_pretrained(language_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(language_run / "model")

    def probability(asked: str, word: str) -> float:
        total = 0.0
        for spelling in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
            begin = tokenizer.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
            begin = begin if isinstance(begin, list) else begin["input_ids"]
            end = tokenizer(spelling, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([[*begin, *end]])).logits[0].double().log_softmax(-1)
            total += sum(logprobs[len(begin) - 1 + i, token] for i, token in enumerate(end)).exp().item()
        return total

    masses = []
    for row in rows:
        asked = f"{row['prompt'][0]['content']} of parcels: {text_of(row['completion'])} good?"
        good, bad = probability(asked, "love"), probability(asked, "rude")
        assert row["score"] == pytest.approx(good / (good + bad), rel=1e-4)
        assert row["label"] == (row["ended"] and row["score"] >= 0.5)
        masses.append(good + bad)
    assert figures["grades_mass"] == pytest.approx(sum(masses) / len(masses), rel=1e-4)


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path, invoke: Invoke) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"the lamp {i}", "chosen": "thank you", "rejected": "never again"} for i in range(8)]
    train(invoke, folder / "run", "reward_model", pico_folder, write_jsonl(folder / "rows.jsonl", rows), max_length=80)
    return folder / "run"


def train(invoke: Invoke, run: Path, method: str, weights: Path, rows: Path, **training: object) -> None:
    """A step of a method on the rows, as the command line makes it."""
    key = "training_data" if method == "sft" else "preference_data"
    config = {
        "computation": {"mode": "posttraining", "method": method},
        "training": {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 1, "precision": "fp32", "device": "cpu",
                     **training},
        "data": {"pretrained_weights": str(weights), "output_dir": str(run), key: str(rows),
                 "validation_share": 0.25},
    }  # fmt: skip
    file = run.with_suffix(".json")
    file.write_text(json.dumps(config), encoding="utf-8")
    # Drawing takes longer than a pico run.
    with patch("loopos.methods.base.write_report"):
        result = invoke("train", file, "--quiet", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["step"] == 1


@pytest.mark.parametrize(
    ("keep", "method"),
    slow_but(
        [("best", "sft"), ("groups", "reward_model"), ("all", "kto")],
        [("best", "sft"), ("pairs", "dpo"), ("pairs", "reward_model"), ("groups", "reward_model"), ("all", "kto"),
         ("all", "sft")],
    ),
)  # fmt: skip
def test_every_file_trains_without_further_settings(
    keep: str, method: str, sampled: Sampled, judges: str, pico_folder: Path, tmp_path: Path, invoke: Invoke
) -> None:
    # A single user message with an answer that is not part of it, and a dialogue after a system message.
    dialogue = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "where is it"},
        {"role": "assistant", "content": "here"},
        {"role": "user", "content": "thank you"},
    ]
    source = write_jsonl(tmp_path / "mixed.jsonl", [*PROMPTS, {"prompt": dialogue, "answer": "8", "topic": ""}])
    words = ["-n", 4, "--keep", keep, "--judge", f"{judges}:longest"]
    words += [] if keep == "groups" else ["--threshold", 10, "--allow-cut"]
    rows, _ = sampled(*words, source=source)
    assert len(rows) >= 7
    if keep == "best":
        # Only the new answer of a dialogue is learned.
        assert [message.get("weight", 1) for message in rows[-1]["messages"] if message["role"] == "assistant"] == [
            0,
            1,
        ]
    if keep == "all":
        assert {row["label"] for row in rows} == {True, False}
    train(invoke, tmp_path / "trained", method, pico_folder, tmp_path / "rows.jsonl")


def test_raw_prompts_are_texts(sampled: Sampled, judges: str) -> None:
    words = ("-n", 4, "--raw", "--judge", f"{judges}:longest", "--allow-cut")
    (first, *_), _ = sampled(*words, "--keep", "pairs")
    assert first["prompt"] == PROMPTS[0]["prompt"]
    assert isinstance(first["chosen"], str)
    assert set(sampled(*words)[0][0]) == {"prompt", "completion", "row", "score"}


def test_a_reward_model_judges_as_score_does(
    sampled: Sampled, reward_run: Path, tmp_path: Path, invoke: Invoke
) -> None:
    source = write_jsonl(tmp_path / "long.jsonl", [*PROMPTS, {"prompt": "my card " * 30}])
    every, figures = sampled("-n", 3, "--keep", "all", "--judge", reward_run, "--chunk", 1, source=source)
    # The last prompt is longer than what the reward model takes: all of its chunk.
    assert figures["unjudged"] == 3
    assert ["score" in row for row in every] == [True] * 21 + [False] * 3
    assert "label" not in every[0]
    scored = [{"prompt": row["prompt"], "response": text_of(row["completion"])} for row in every[:21]]
    result = invoke("score", reward_run, write_jsonl(tmp_path / "scored.jsonl", scored), "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    expected = [json.loads(line)["score"] for line in result.stdout.splitlines()]
    assert [row["score"] for row in every[:21]] == pytest.approx(expected, abs=1e-5)


def test_people_read_a_table(language_run: Path, prompts: Path, tmp_path: Path, invoke: Invoke) -> None:
    words = ("-o", tmp_path / "rows.jsonl", "--judge", "numeric", "-n", 2, "--limit", 3, *WORDS)
    result = invoke("sample", language_run, prompts, *words)
    assert result.exit_code == 0
    assert "3 prompts, 6 answers" in result.stdout
    assert "pass@2" in result.stdout
    assert "no answer was kept" in result.stderr
    assert (tmp_path / "rows.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("words", "summary"),
    [
        (("--judge", "no_such_module:f"), "reward function no_such_module:f: cannot import"),
        (("--judge", "nowhere"), "nowhere: no trained model here"),
        (("--judge", "MODEL"), "a language model, which scores no responses"),
        (("--judge-model", "nowhere"), "nowhere"),
        (("--keep", "best"), "--keep best: needs scores"),
        (("--keep", "all", "--threshold", 1), "--threshold: needs scores"),
        (("--judge", "exact", "--judge-model", "x"), "use only one of the two"),
        (("--judge", "exact", "--grades", "a,b"), "--grades without --judge-model"),
        (("--judge", "exact", "--judge-options", "{}"), "--judge-options: needs a reward function as --judge"),
        (("--judge", "regex", "--judge-options", "a"), "--judge-options: not JSON"),
        (("--judge", "regex", "--judge-options", "[]"), "--judge-options: got []; expected a section"),
        (("--judge", "regex", "--judge-options", '{"patern": "a"}'), "options.patern: got an unknown option"),
        (("--judge-model", "MODEL", "--grades", "yes"), "grades: got yes; expected"),
        (("--judge-model", "MODEL", "--grades", "1,10"), "the tokens of 10 begin with those of 1"),
        (("--judge", "exact", "--keep", "worst"), "--keep: got worst; expected one of best, pairs, groups, all"),
        (("--judge", "exact", "--pairs", "all"), "--pairs with --keep best"),
        (("--judge", "exact", "--keep", "pairs", "-n", 1), "two answers are compared"),
        (("--judge", "exact", "--keep", "pairs", "--min-margin", -1), "--min-margin: got -1"),
        (("--judge", "exact", "--temperature", 0), "all answers would be equal"),
        (("--judge", "exact", "--chunk", 0), "--chunk: got 0"),
        (("--judge", "exact", "--columns", "prompt=topic"), 'has no column "answer" for exact'),
    ],
)
def test_mistakes(words: tuple[Any, ...], summary: str, language_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    rows = [{"topic": "parcels"}] if "--columns" in words else PROMPTS
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    words = tuple(language_run if word == "MODEL" else word for word in words)
    result = invoke("sample", language_run, prompts, "-o", tmp_path / "rows.jsonl", *words)
    assert result.exit_code == 2, result.stderr
    assert summary in result.stderr
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_judge_that_fails_costs_no_responses(
    language_run: Path, prompts: Path, judges: str, tmp_path: Path, invoke: Invoke
) -> None:
    words = ("-n", 3, "--keep", "all", "--chunk", 1, "-o", tmp_path / "rows.jsonl", *WORDS)
    failed = invoke("sample", language_run, prompts, *words, "--judge", f"{judges}:broken")
    assert failed.exit_code == 2
    assert "no such parcel" in failed.stderr
    progress = tmp_path / "rows.jsonl.progress"
    before = digest(progress / RESPONSES)
    assert len((progress / SCORES).read_text().splitlines()) == 1 + 4
    # Other settings are refused, and leave everything as it was.
    other = invoke("sample", language_run, prompts, *words[2:], "-n", 2, "--judge", f"{judges}:longest")
    assert other.exit_code == 2
    assert "samples: was 3, is 2" in other.stderr
    assert digest(progress / RESPONSES) == before
    with patch("loopos.generation.engine.Engine.generate", side_effect=AssertionError("generated again")):
        result = invoke("sample", language_run, prompts, *words, "--judge", f"{judges}:longest")
    assert result.exit_code == 0, result.stderr
    assert "the judge has changed (function)" in result.stderr
    assert all(row["score"] == len(text_of(row["completion"])) for row in rows_of(tmp_path / "rows.jsonl"))
    assert not progress.exists()


def check_kills(invoke: Invoke, model: Path, source: Path, judge: str, out: Path, *, kills: int) -> None:
    """Kills the command at random moments; the file that it leaves in the end equals that of an uninterrupted one."""
    words = ("-n", 4, "--keep", "pairs", "--judge", judge, "--allow-cut", "--chunk", 2, "-o", out, *WORDS)

    def run() -> None:
        result = invoke("sample", model, source, *words)
        assert result.exit_code == 0, result.stderr

    began = time.monotonic()
    assert in_a_child(run, None) == 0
    seconds, expected = time.monotonic() - began, digest(out)
    assert rows_of(out)
    out.unlink()
    draw, killed = random.Random(3), 0
    while killed < kills:
        began = time.monotonic()
        if in_a_child(run, draw.uniform(0.2, 0.95) * seconds) is None:
            killed += 1
        else:
            seconds = min(seconds, time.monotonic() - began)
        if out.exists():
            # Written completely, or not at all.
            assert digest(out) == expected
            out.unlink()
    assert in_a_child(run, None) == 0
    assert digest(out) == expected
    assert sorted(os.listdir(out.parent)) == [out.name]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_random_moments(
    language_run: Path, prompts: Path, judges: str, tmp_path: Path, invoke: Invoke
) -> None:
    (tmp_path / "out").mkdir()
    check_kills(
        invoke,
        language_run,
        prompts,
        f"{judges}:of_rows",
        tmp_path / "out" / "rows.jsonl",
        kills=max(2, NUM_KILLS // 2),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_twenty_times(language_run: Path, reward_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    source = write_jsonl(tmp_path / "many.jsonl", [{"prompt": f"the lamp broke {i}"} for i in range(60)])
    (tmp_path / "out").mkdir()
    check_kills(invoke, language_run, source, str(reward_run), tmp_path / "out" / "rows.jsonl", kills=20)


@pytest.mark.parametrize(
    ("cut", "file"), slow_but(("chunk", SCORES), product(("header", "chunk", "whole"), (RESPONSES, SCORES)))
)
def test_every_torn_end_is_made_again(
    file: str, cut: str, language_run: Path, prompts: Path, judges: str, tmp_path: Path, invoke: Invoke
) -> None:
    """The progress is cut at a chosen byte: within the header, within a chunk, and between two chunks. In bf16 a response
    depends on the rows beside it, which a resumed chunk has too.
    """
    out = tmp_path / "rows.jsonl"
    words = (
        "--precision",
        "bf16",
        "-n",
        3,
        "--keep",
        "all",
        "--judge",
        f"{judges}:longest",
        "--chunk",
        2,
        "-o",
        out,
        *WORDS,
    )
    progress = tmp_path / "rows.jsonl.progress"
    # The rows are complete but not yet in their position when the process ends.
    with patch("loopos.rl.rejection_sampling.write_whole", side_effect=KeyboardInterrupt):
        assert invoke("sample", language_run, prompts, *words).exit_code == 130
    lines = (progress / file).read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 7
    rest = {"header": lines[0][:-5], "chunk": b"".join(lines[:4]) + lines[4][:9], "whole": b"".join(lines[:5])}
    (progress / file).write_bytes(rest[cut])
    assert invoke("sample", language_run, prompts, *words).exit_code == 0
    resumed = digest(out)
    assert invoke("sample", language_run, prompts, *words).exit_code == 0
    assert digest(out) == resumed


def test_lines_grow_in_whole_chunks(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    with ChunkedLines(file, [2, 1, 2], {"seed": 1}) as lines:
        lines.append([{"a": 1}, {"a": "\u2028\r\n"}])
        lines.append([{"a": 3}])
        assert (lines.num_chunks, lines.chunk(0)) == (2, [{"a": 1}, {"a": "\u2028\r\n"}])
    whole = file.read_bytes()
    # A line of the third chunk: without its second one it does not count.
    file.write_bytes(whole + b'{"a": 4}\n{"a"')
    with ChunkedLines(file, [2, 1, 2], {"seed": 1}) as lines:
        assert lines.num_chunks == 2
        lines.append([{"a": 5}, {"a": 6}])
        assert [lines.chunk(index) for index in (1, 2)] == [[{"a": 3}], [{"a": 5}, {"a": 6}]]
    assert file.read_bytes() == whole + b'{"a": 5}\n{"a": 6}\n'


def test_log_probabilities_are_stored_and_distilled(
    sampled: Sampled, language_run: Path, pico_folder: Path, tmp_path: Path, invoke: Invoke
) -> None:
    """With all tokens as candidates the loss over the file is that of the live teacher on the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loopos.data.rows import Row
    from loopos.data.stored_logprobs import COLUMN, StoredLogprobs, vocabulary_digest

    plain, _ = sampled("-n", 2, "--keep", "all")
    rows, _ = sampled("-n", 2, "--keep", "all", "--logprobs", 4)
    assert [{name: value for name, value in row.items() if name != COLUMN} for row in rows] == plain
    assert sampled("-n", 2, "--keep", "all", "--logprobs", 4, "--chunk", 3)[0] == rows
    model = AutoModelForCausalLM.from_pretrained(language_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(language_run / "model")
    for number, row in enumerate(rows):
        stored = StoredLogprobs.of_row(Row(row, "rows", 1, number), tokenizer, vocabulary_digest(tokenizer))
        ids = torch.tensor([[*stored.prompt, *stored.completion]])
        logits = model(ids).logits[0, len(stored.prompt) - 1 : -1]
        expected = torch.log_softmax(logits.detach(), -1).topk(4)
        assert stored.ids.tolist() == expected.indices.tolist()
        torch.testing.assert_close(
            torch.tensor(stored.logprobs.astype("float32")), expected.values, atol=4e-3, rtol=1e-3
        )
        assert len(stored.completion) == row["tokens"]
    # All tokens as candidates: the loss is that of the whole distributions.
    every, _ = sampled("-n", 1, "--keep", "all", "--logprobs", 400, name="every.jsonl")
    torch.manual_seed(5)
    student = AutoModelForCausalLM.from_config(model.config)
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    config = {
        "computation": {"mode": "posttraining", "method": "distillation"},
        "training": {"learning_rate": 1e-3, "batch_size": 16, "max_steps": 1, "precision": "fp32", "warmup": 0},
        "distillation": {"loss": "reverse_kl"},
        "evaluation": {"samples": 0},
        "data": {
            "pretrained_weights": str(tmp_path / "student"), "training_data": str(tmp_path / "every.jsonl"),
            "validation_share": 0.0, "output_dir": str(tmp_path / "distilled"),
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    result = invoke("train", tmp_path / "config.json", "--quiet")
    assert result.exit_code == 0, result.stderr
    events = [json.loads(line) for line in (tmp_path / "distilled" / "events.jsonl").read_text().splitlines()]
    (found,) = [event["metrics"] for event in events if event["event"] == "step"]
    divergences = []
    for row in every:
        prompt, completion = row[COLUMN]["prompt_ids"], row[COLUMN]["completion_ids"]
        ids = torch.tensor([[*prompt, *completion]])
        log_p, log_q = (
            torch.log_softmax(each(ids).logits[0, len(prompt) - 1 : -1].detach(), -1) for each in (student, model)
        )
        divergences += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    assert found["loss"] == pytest.approx(sum(divergences) / len(divergences), rel=2e-3)
    assert found["teacher_top_k_mass"] == pytest.approx(1.0, abs=1e-3)


def test_log_probabilities_of_another_tokenizer_are_refused(
    sampled: Sampled, pico_folder: Path, tmp_path: Path, invoke: Invoke
) -> None:
    rows, _ = sampled("-n", 1, "--keep", "all", "--logprobs", 4)
    rows[3]["teacher"]["vocabulary"] = "0" * 16
    data = write_jsonl(tmp_path / "other.jsonl", rows)
    config = {
        "computation": {"mode": "posttraining", "method": "distillation"},
        "training": {"learning_rate": 1e-3},
        "data": {
            "pretrained_weights": str(pico_folder), "training_data": str(data), "output_dir": str(tmp_path / "run"),
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    result = invoke("train", tmp_path / "config.json", "--quiet")
    assert result.exit_code != 0
    assert "other.jsonl:4: teacher: got tokens of another tokenizer" in result.stderr
    assert "student and teacher need the same tokenizer" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", "all", "--logprobs", 0), "--logprobs: got 0; expected 1 or more"),
        (("--keep", "pairs", "--judge", "exact", "--logprobs", 4), "--logprobs with --keep pairs"),
        (("--keep", "all", "--logprobs", 4000), "--logprobs: got 4000; expected at most 400"),
    ],
)
def test_log_probabilities_that_cannot_be_kept(
    words: tuple[object, ...], message: str, language_run: Path, prompts: Path, tmp_path: Path, invoke: Invoke
) -> None:
    result = invoke("sample", language_run, prompts, "-o", tmp_path / "rows.jsonl", *words, *WORDS)
    assert result.exit_code != 0
    assert message in result.stderr


def test_a_teacher_answers_for_the_student(
    language_run: Path, pico_folder: Path, prompts: Path, tmp_path: Path, invoke: Invoke
) -> None:
    """With --teacher the answers are the teacher's; with --logprobs the student's template renders the prompts."""
    words = ("-n", 2, "--keep", "all", *WORDS)
    own, taught = tmp_path / "own.jsonl", tmp_path / "taught.jsonl"
    assert invoke("sample", language_run, prompts, "-o", own, *words).exit_code == 0
    result = invoke("sample", pico_folder, prompts, "-o", taught, *words, "--teacher", language_run, "--logprobs", 2)
    assert result.exit_code == 0, result.stderr
    rows = rows_of(taught)
    assert len(rows) == len(rows_of(own))
    assert all(row["teacher"]["k"] == 2 for row in rows)


def test_an_endpoint_answers(
    language_run: Path, prompts: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    seen: list[tuple[str | None, dict[str, Any]]] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.headers["Authorization"], body))
            text = f"{body['messages'][-1]['content']} {body['seed']}"
            reply = {
                "choices": [{"message": {"content": text}, "finish_reason": "stop" if "3" in text else "length"}],
                "usage": {"total_tokens": 9, "completion_tokens": 4},
            }
            content = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url, file = f"http://127.0.0.1:{server.server_port}/v1", tmp_path / "rows.jsonl"
        words = ("-o", file, "-n", 2, "--keep", "all", "--teacher", url, "--teacher-model", "big", *WORDS)
        monkeypatch.delenv("TEACHER_KEY", raising=False)
        refused = invoke("sample", language_run, prompts, *words, "--api-key-env", "TEACHER_KEY")
        assert refused.exit_code != 0
        assert "the environment variable TEACHER_KEY is not set" in refused.stderr
        monkeypatch.setenv("TEACHER_KEY", "secret")
        result = invoke("sample", language_run, prompts, *words, "--api-key-env", "TEACHER_KEY")
        assert result.exit_code == 0, result.stderr
    finally:
        server.shutdown()
        server.server_close()
    rows = rows_of(file)
    assert len(seen) == len(rows) == 14
    assert {key for key, _ in seen} == {"Bearer secret"}
    assert "secret" not in file.read_text() + result.stdout + result.stderr
    assert [text_of(row["completion"]) for row in rows[:3]] == [
        "where is parcel 0 3", "where is parcel 0 4", "where is parcel 1 3",
    ]  # fmt: skip
    assert [row["ended"] for row in rows[:2]] == [True, False]
    assert {body["max_tokens"] for _, body in seen} == {8}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--teacher", "http://host/v1"), "use --teacher-model"),
        (("--teacher-model", "big"), "--teacher-model: needs an endpoint"),
        (("--teacher", "http://host/v1", "--teacher-model", "big", "--logprobs", 3), "--logprobs with an endpoint"),
        (("--teacher", "http://host/v1", "--teacher-model", "big", "--top-k", 3), "--top-k with an endpoint"),
    ],
)
def test_contradictions_of_a_teacher(
    words: tuple[object, ...], message: str, language_run: Path, prompts: Path, tmp_path: Path, invoke: Invoke
) -> None:
    result = invoke("sample", language_run, prompts, "-o", tmp_path / "rows.jsonl", "--keep", "all", *words, *WORDS)
    assert result.exit_code != 0
    assert message in result.stderr
