"""Greedy text of an exported GGUF file: llama.cpp beside LoopOS's engine, on the same prompts.

    python bench/gguf_text.py [--model smollm2-135m] [--type f16] [--prompts 20] [--tokens 48]

Needs llama-cpp-python (pip install llama-cpp-python), which is built from source. The model is exported to a temporary
folder; both engines continue the same token ids without sampling. One JSON line a prompt (tokens that agree before the
first that does not, and whether both made the same ids of the prompt's text), then one with the shares. LoopOS runs the
weights in fp32; llama.cpp computes F16 files partly in half precision, so that a near tie may fall the other way: where
the two part, `gap` is how far LoopOS's logit of its own token lies above that of llama.cpp's, `noise` the root mean
square of all differences between their logits there, and `spread` the standard deviation of LoopOS's.
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
    "The keeper of the lighthouse", "Once upon a time", "The capital of France is", "To make bread you need",
    "def add(a, b):", "In 1969 two people", "Water boils at", "My favourite season is", "A good teacher", "The moon",
    "Q: What is 17 + 26?\nA:", "The quick brown fox", "Dear Sir or Madam,", "List three colours:", "Rivers flow to",
    "The recipe says", "If it rains tomorrow", "Music is", "The train left at", "She opened the door and",
)  # fmt: skip


def agreeing(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def near_tie(model: Any, ids: list[int], scores: Any, ours: int, theirs: int) -> dict[str, float]:
    """How far apart the logits of two tokens are after `ids`, and all of them from llama.cpp's, `scores`."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
    noise = (logits - torch.from_numpy(scores)).square().mean().sqrt()
    found = {"gap": logits[ours] - logits[theirs], "noise": noise, "spread": logits.std()}
    return {name: round(float(value), 4) for name, value in found.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--type", default="f16")
    options.add_argument("--prompts", type=int, default=len(PROMPTS))
    options.add_argument("--tokens", type=int, default=48)
    asked = options.parse_args()
    try:
        from llama_cpp import Llama
    except ModuleNotFoundError:
        sys.exit("bench/gguf_text.py needs llama-cpp-python: pip install llama-cpp-python")
    from loopos.deploy.export import export
    from loopos.deploy.export_settings import ExportSettings
    from loopos.generation.engine import Engine
    from loopos.generation.settings import SamplingSettings
    from loopos.models.language_folder import open_language_model

    opened = open_language_model(asked.model)
    texts = list(PROMPTS[: asked.prompts])
    ids = [opened.tokenizer(text)["input_ids"] for text in texts]
    engine = Engine(opened.model, opened.tokenizer, max_rows=len(texts))
    settings = SamplingSettings(temperature=0.0, max_new_tokens=asked.tokens)
    ours = [list(each.token_ids) for each in engine.generate(ids, settings)]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        done = export(asked.model, Path(folder) / "out", ExportSettings(format="gguf", type=asked.type, check=False))
        seconds = time.perf_counter() - begun
        [file] = done.folder.glob("*.gguf")
        runtime = Llama(model_path=str(file), n_ctx=512, logits_all=True, verbose=False)
        whole = same_ids = 0
        for text, prompt, expected in zip(texts, ids, ours, strict=True):
            theirs: list[int] = []
            runtime.reset()
            for token in runtime.generate(prompt, temp=0.0, repeat_penalty=1.0):
                theirs.append(int(token))
                if len(theirs) == len(expected):
                    break
            equal_ids = runtime.tokenize(text.encode(), add_bos=False, special=True) == prompt
            number = agreeing(expected, theirs)
            whole += number == len(expected)
            same_ids += equal_ids
            line = {"prompt": text, "tokens": len(expected), "agree": number, "same_prompt_ids": equal_ids}
            if number < min(len(expected), len(theirs)):
                seen = [*prompt, *expected[:number]]
                runtime.reset()
                runtime.eval(seen)
                line |= near_tie(opened.model, seen, runtime.scores[len(seen) - 1], expected[number], theirs[number])
            print(json.dumps(line), flush=True)
    told = {"model": asked.model, "type": asked.type, "prompts": len(texts), "same_text": whole / len(texts)}
    told |= {"same_prompt_ids": same_ids / len(texts), "bytes": done.bytes_after, "export_seconds": round(seconds, 1)}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
