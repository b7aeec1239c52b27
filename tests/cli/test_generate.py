"""`loopos generate` on a pico model: the text equals that of transformers, and contradictions are reported before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke, Reference, write_jsonl

PROMPT = "where is the parcel"
ASKED = [{"role": "user", "content": PROMPT}]
CPU = ("--device", "cpu", "--max-new-tokens", "12")


def lines(result: Any) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_greedy_text_is_transformers(language_run: Path, invoke: Invoke, greedy: Reference) -> None:
    result = invoke("generate", language_run, "-p", PROMPT, *CPU)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == greedy(ASKED, 12) + "\n"


def test_a_raw_prompt_is_continued_unchanged(language_run: Path, invoke: Invoke, greedy: Reference) -> None:
    (line,) = lines(invoke("generate", language_run, "-p", PROMPT, "--raw", "--json", *CPU))
    assert line["text"] == greedy(PROMPT, 12)
    assert line["text"] != greedy(ASKED, 12)


def test_system_text_comes_first(language_run: Path, invoke: Invoke, greedy: Reference) -> None:
    (line,) = lines(invoke("generate", language_run, "-p", PROMPT, "--system", "be kind", "--json", *CPU))
    assert line["text"] == greedy([{"role": "system", "content": "be kind"}, *ASKED], 12)


def test_lines_of_json(language_run: Path, invoke: Invoke, greedy: Reference) -> None:
    told = lines(invoke("generate", language_run, "-p", PROMPT, "-p", "my card", "--json", *CPU))
    assert [line["prompt"] for line in told] == [PROMPT, "my card"]
    assert set(told[0]) == {"prompt", "text", "logprob", "finish_reason", "tokens"}
    assert (told[0]["finish_reason"], told[0]["tokens"]) == ("length", 12)
    assert told[0]["logprob"] < 0
    assert told[1]["text"] == greedy([{"role": "user", "content": "my card"}], 12)


def test_prompts_come_from_lines_and_from_rows(language_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    words = [PROMPT, "my card was charged"]
    actual = lines(invoke("generate", language_run, "-p", words[0], "-p", words[1], "--json", *CPU))
    text = tmp_path / "prompts.txt"
    text.write_text("\n".join(words) + "\n", encoding="utf-8")
    sources = [
        text,
        write_jsonl(tmp_path / "solved.jsonl", [{"question": word, "answer": "1"} for word in words]),
        write_jsonl(tmp_path / "open.jsonl", [{"problem": word, "level": 3} for word in words]),
        write_jsonl(
            tmp_path / "said.jsonl",
            [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": "x"}]} for w in words],
        ),
    ]
    for source in sources:
        assert lines(invoke("generate", language_run, "--input", source, "--json", *CPU)) == actual, source
    piped = invoke("generate", language_run, "--input", "-", "--json", *CPU, text="\n".join(words))
    assert lines(piped) == actual


def test_a_file_of_answers(language_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    file = tmp_path / "said.jsonl"
    result = invoke("generate", language_run, "-p", PROMPT, "-o", file, *CPU)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert json.loads(file.read_text(encoding="utf-8"))["prompt"] == PROMPT


def test_samples_differ_and_a_seed_repeats_them(language_run: Path, invoke: Invoke) -> None:
    words = ("generate", language_run, "-p", PROMPT, "-n", 3, "--temperature", 1, "--json", *CPU)
    first, again, other = lines(invoke(*words)), lines(invoke(*words)), lines(invoke(*words, "--seed", 7))
    assert [line["sample"] for line in first] == [0, 1, 2]
    assert len({line["text"] for line in first}) == 3
    assert first == again
    assert first != other


def test_options_reach_the_sampling(language_run: Path, invoke: Invoke, greedy: Reference) -> None:
    """The one likeliest token is the greedy one, by every filter; a repeated pair of tokens is forbidden."""
    for narrow in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        (line,) = lines(invoke("generate", language_run, "-p", PROMPT, "--temperature", 1, *narrow, "--json", *CPU))
        assert line["text"] == greedy(ASKED, 12), narrow
    plain = greedy(ASKED, 12)
    (line,) = lines(invoke("generate", language_run, "-p", PROMPT, "--stop", plain[4:6], "--json", *CPU))
    assert (line["text"], line["finish_reason"]) == (plain[: plain.index(plain[4:6])], "stop string")
    (line,) = lines(invoke("generate", language_run, "-p", PROMPT, "--presence-penalty", 50, "--json", *CPU))
    assert line["text"] != plain


def test_steps_are_numbered_with_their_logprobs(language_run: Path, invoke: Invoke) -> None:
    limits = ("--max-steps", 2, "--max-step-tokens", 3, "--max-new-tokens", 30, "--device", "cpu")
    result = invoke("generate", language_run, "-p", PROMPT, "--steps", *limits)
    assert result.exit_code == 0, result.stderr
    shown = result.stdout.splitlines()
    assert shown[0].startswith("1. ")
    assert any(line.startswith("2. ") for line in shown)
    assert any(line.startswith("answer: ") for line in shown)
    (line,) = lines(invoke("generate", language_run, "-p", PROMPT, "--steps", "--json", *limits))
    assert len(line["steps"]) == 2
    assert f"[{line['steps'][0]['logprob']:.2f}]" in result.stdout
    assert f"answer: {line['answer']}" in result.stdout
    assert line["tokens"] <= 30


@pytest.mark.parametrize("strategy", ["self_consistency:3", "best_of_n:3", "step_beam:2x2"])
def test_strategies_give_an_answer_and_a_confidence(language_run: Path, invoke: Invoke, strategy: str) -> None:
    words = ("generate", language_run, "-p", PROMPT, "--strategy", strategy, "--temperature", 1, *CPU)
    (line,) = lines(invoke(*words, "--json", "--max-steps", 2))
    assert {"answer", "confidence", "answers", "steps"} <= set(line)
    assert 2 <= len(line["answers"]) <= 3
    told = invoke(*words, "--steps", "--max-steps", 2)
    assert "chains" in told.stdout


def test_beams_are_transformers(language_run: Path, invoke: Invoke) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    told = lines(invoke("generate", language_run, "-p", PROMPT, "--num-beams", 3, "-n", 2, "--json", *CPU))
    model = AutoModelForCausalLM.from_pretrained(language_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(language_run / "model")
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    made = model.generate(
        ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=12, num_beams=3, num_return_sequences=2
    )
    expected = [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in made]
    assert [line["text"] for line in told] == expected
    assert told[0]["logprob"] / told[0]["tokens"] >= told[1]["logprob"] / told[1]["tokens"]


def test_streamed_text_is_the_whole_text(language_run: Path, greedy: Reference) -> None:
    from loopos.cli.generate import streamed
    from loopos.cli.opened_models import open_reasoner
    from loopos.cli.prompts import of_text
    from loopos.cli.sampling_options import SamplingOptions

    reasoner = open_reasoner(str(language_run), device="cpu", precision="auto")
    pieces = list(streamed(reasoner, of_text(PROMPT, 0, raw=False), SamplingOptions(max_new_tokens=12).settings()))
    assert len(pieces) == 12
    assert "".join(pieces) == greedy(ASKED, 12)


CONTRADICTIONS = [
    (("-p", "x", "-n", 3), ["--samples 3 at --temperature 0"]),
    (("-p", "x", "--strategy", "best_of_n:4"), ["--strategy best_of_n:4 at --temperature 0"]),
    (
        ("-p", "x", "--strategy", "self_consistency:4", "--temperature", 1, "-n", 2),
        ["--samples 2 with --strategy self_consistency:4"],
    ),
    (
        ("-p", "x", "--num-beams", 2, "--steps", "--top-p", 0.5, "-n", 3),
        ["--steps with --num-beams", "--top-p with --num-beams", "--samples: got 3; expected 1 to --num-beams 2"],
    ),
    (("-p", "x", "--reward-model", "y"), ["--reward-model: ranks the chains of --strategy best_of_n:N"]),
    (("-p", "x", "--raw", "--system", "y"), ["--system with --raw"]),
    ((), ["no prompt: use -p TEXT"]),
    (("-p", "x", "--input", "y.txt"), ["-p and --input"]),
    (("-p", " "), ["-p: got a blank text"]),
    (
        ("-p", "x", "--top-p", 2, "--max-steps", 0, "--strategy", "vote", "--device", "gpu", "--precision", "int8"),
        ["--top-p: got 2.0", "--max-steps: got 0", "--strategy: got 'vote'", "--device: got gpu", "int8"],
    ),
    (("-p", "x", "--max-thinking-tokens", 300), ["--max-thinking-tokens: got 300; expected fewer than"]),
]


@pytest.mark.parametrize(("words", "summary"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_diagnostics_come_all_at_once(
    language_run: Path, invoke: Invoke, words: tuple[Any, ...], summary: list[str]
) -> None:
    result = invoke("generate", language_run, *words)
    assert result.exit_code == 2
    assert [part for part in summary if part not in result.stderr] == []
    assert len(result.stderr.splitlines()) == len(summary)
    assert result.stdout == ""


def test_diagnostics_come_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys, typer\n"
        "from loopos.cli.commands import app\n"
        "for words in (['generate', 'absent/model/here', '-p', 'x'], ['generate', 'x', '-p', 'y', '--top-k', '-1'],\n"
        "              ['chat', '.'], ['evaluate', 'x', 'y', '--metric', 'speed']):\n"
        "    try:\n"
        "        app(words)\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == 2, words\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), words\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    summary = ended.stderr.splitlines()
    assert summary[0].startswith("absent/model/here does not exist")
    assert summary[1].startswith("--top-k: got -1")
    assert summary[2].startswith(".: no trained model here")
    assert summary[3].startswith("--metric: got speed; expected one of accuracy, loss, perplexity")


def test_a_model_with_a_head_generates_no_text(trained: Any, project: Path, invoke: Invoke) -> None:
    for command in (("generate", "-p", "x"), ("chat",)):
        result = invoke(command[0], project / "outputs" / "first", *command[1:], text="")
        assert result.exit_code == 2
        assert "loopos predict" in result.stderr


def test_predict_sends_language_models_to_generate(language_run: Path, invoke: Invoke) -> None:
    result = invoke("predict", language_run, "-", text="one text\n")
    assert result.exit_code == 2
    assert "loopos generate" in result.stderr
    assert result.stdout == ""


def test_filters_without_effect_are_reported(language_run: Path, invoke: Invoke) -> None:
    result = invoke("generate", language_run, "-p", PROMPT, "--top-p", 0.5, *CPU)
    assert result.exit_code == 0
    assert "--top-p has no effect" in result.stderr
