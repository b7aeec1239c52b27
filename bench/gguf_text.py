"""Greedy chat text of an exported GGUF file: llama.cpp beside LoopOS's engine, on the same conversations.

    python bench/gguf_text.py [--model smollm2-135m] [--types f16 q8_0 q4_0] [--prompts 20] [--tokens 48]

Needs xllamacpp (pip install xllamacpp), llama.cpp with wheels. The model is exported to a temporary folder; LoopOS writes
the model's own answers, in fp32 and through its chat template, llama.cpp those of the file, through the template in it.
One JSON line a prompt (whether the texts are equal, whether the prompts have equally many tokens, and how many tokens
agree before the first that does not), then one a type with the shares. Where the two part, `gap` is how far LoopOS's
log-probability of its own token lies above that of llama.cpp's, in nats: a near tie may fall the other way.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS = (
    "What is the capital of France?", "Write one sentence about a lighthouse.", "What is 17 + 26?",
    "List three colors of the rainbow.", "Explain in two sentences why the sky is blue.",
    "Give me a name for a grey cat.", "How do I boil an egg?", "Translate 'good morning' to Spanish.",
    "Who wrote Romeo and Juliet?", "Write a Python function that adds two numbers.", "What do bees make?",
    "Finish the sentence: If it rains tomorrow,", "What is the opposite of hot?", "Name a river in Egypt.",
    "Tell me a short story about a fox.", "What should I pack for a day at the beach?",
    "Rewrite politely: give me the report now.", "How many days has a leap year?", "What is a noun?",
    "Suggest a title for a book about old trains.",
)  # fmt: skip


def agreeing(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def gap_between(model: Any, ids: list[int], ours: int, theirs: int) -> float:
    """How much likelier one token is than another after `ids`, in nats."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
    return round(float(logits[ours] - logits[theirs]), 4)


def chat_texts(opened: Any, ours: list[list[int]], prompts: list[list[int]], file: Path, texts: list[str]) -> list[Any]:
    """A line for each prompt."""
    from loopos.exporting.language_check import LlamaCpp

    runtime = LlamaCpp(file, context=1024)
    lines = []
    for text, prompt, expected in zip(texts, prompts, ours, strict=True):
        answer = runtime.chat([{"role": "user", "content": text}], len(expected))
        own = opened.tokenizer.decode(expected, skip_special_tokens=True)
        line = {"prompt": text, "same_text": answer.text.strip() == own.strip(), "tokens": len(expected)}
        line["same_prompt_length"] = answer.num_prompt == len(prompt)
        if not line["same_text"]:
            theirs = opened.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
            number = line["agree"] = min(agreeing(expected, theirs), len(expected) - 1)
            step = runtime.next_token([*prompt, *expected[:number]])
            if step is not None:
                line["gap"] = gap_between(opened.model, [*prompt, *expected[:number]], expected[number], step.token)
        print(json.dumps(line), flush=True)
        lines.append(line)
    return lines


def compared(model: str, types: list[str], texts: list[str], tokens: int) -> dict[str, dict[str, Any]]:
    """Type → its shares, each printed as it comes."""
    from loopos.exporting.export import export
    from loopos.exporting.settings import ExportSettings
    from loopos.generation.engine import Engine
    from loopos.generation.settings import SamplingParams
    from loopos.models.folders import open_language_model

    opened = open_language_model(model)
    prompts = [
        opened.tokenizer(
            opened.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        )["input_ids"]
        for text in texts
    ]
    engine = Engine(opened.model, opened.tokenizer, max_rows=len(texts))
    settings = SamplingParams(temperature=0.0, max_new_tokens=tokens)
    ours = [list(each.token_ids) for each in engine.generate(prompts, settings)]
    found = {}
    for kind in types:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            done = export(model, Path(folder) / "out", ExportSettings(format="gguf", type=kind))
            seconds = time.perf_counter() - begun
            [file] = done.folder.glob("*.gguf")
            lines = chat_texts(opened, ours, prompts, file, texts)
        parted = [line.get("gap", 0.0) for line in lines if not line["same_text"]]
        assert done.check is not None
        found[kind] = {
            "model": model,
            "type": kind,
            "prompts": len(texts),
            "same_text": sum(line["same_text"] for line in lines) / len(lines),
            "same_prompt_length": sum(line["same_prompt_length"] for line in lines) / len(lines),
            "largest_gap": max(parted, default=0.0),
            "same_likeliest": round(done.check.same, 4),
            "check": done.check.summary(),
            "bytes": done.bytes_after,
            "export_seconds": round(seconds, 1),
        }
        print(json.dumps(found[kind]), flush=True)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_0"])
    options.add_argument("--prompts", type=int, default=len(PROMPTS))
    options.add_argument("--tokens", type=int, default=48)
    actual = options.parse_args()
    try:
        import xllamacpp  # noqa: F401
    except ModuleNotFoundError:
        sys.exit("bench/gguf_text.py needs xllamacpp: pip install xllamacpp")
    compared(actual.model, actual.types, list(PROMPTS[: actual.prompts]), actual.tokens)


if __name__ == "__main__":
    main()
