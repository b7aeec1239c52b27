"""A server under load: many clients at once for a while, by the official openai client against the command itself.

    python bench/serving.py [--model FOLDER] [--clients 64] [--seconds 60] [--max-tokens 32] [--max-rows 16]

Without --model a random pico Llama is made, so that what is measured is the server. Each client is a thread that asks
again as soon as it has its answer: every other one streams, prompts and numbers of tokens differ, each tenth stream is
dropped in the middle. One JSON line: requests, errors (anything but an answer), tokens a second, seconds a request
(median, 99th percentile), memory of the server at the start, after a quarter of the time, and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError

WORDS = ("parcel", "order", "lamp", "invoice", "card", "film", "room", "answer", "address", "hour")


def pico(folder: Path) -> Path:
    """A random two-layer Llama with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer.get_vocab()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


class Load:
    """Clients that ask until the time is over, and what they saw."""

    def __init__(self, url: str, name: str, options: argparse.Namespace) -> None:
        self.url, self.name, self.options = url, name, options
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.seconds: list[float] = []
        self._lock = threading.Lock()
        self._end = time.monotonic() + options.seconds

    def run(self) -> None:
        threads = [threading.Thread(target=self._client, args=(index,)) for index in range(self.options.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, index: int) -> None:
        draw = random.Random(index)
        with OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            while time.monotonic() < self._end:
                began = time.monotonic()
                try:
                    kind, tokens = self._ask(client, draw)
                except OpenAIError as error:
                    kind, tokens = "errors", 0
                    with self._lock:
                        self.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                with self._lock:
                    self.counts[kind] += 1
                    self.counts["requests"] += 1
                    self.counts["tokens"] += tokens
                    self.seconds.append(time.monotonic() - began)

    def _ask(self, client: OpenAI, draw: random.Random) -> tuple[str, int]:
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        asked: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": draw.randint(1, self.options.max_tokens),
            "temperature": draw.choice((0.0, 0.7, 1.0)),
            "seed": draw.randrange(100),
        }
        if draw.random() < 0.5:
            answer = client.chat.completions.create(**asked)
            return "whole", answer.usage.completion_tokens if answer.usage else 0
        drops = draw.random() < 0.1
        stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        tokens = 0
        for index, chunk in enumerate(stream):
            if drops and index == 2:
                stream.close()
                return "dropped", 0
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
        return "streamed", tokens


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("model", ""), ("clients", 64), ("seconds", 60.0), ("max-tokens", 32), ("max-rows", 16)):
        parser.add_argument(f"--{name}", default=value, type=type(value))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        model = options.model or str(pico(Path(home)))
        line = [sys.executable, "-m", "loopos", "serve", model, "--port", "0", "--max-rows", str(options.max_rows)]
        with subprocess.Popen([*line, "--name", "m"], stderr=subprocess.PIPE, text=True, env=os.environ) as process:
            assert process.stderr is not None
            found = None
            for told in process.stderr:
                sys.stderr.write(told)
                if found := re.search(r" at (http://\S+) ", told):
                    break
            assert found is not None, "the server did not start"
            url = found[1]
            load = Load(url, "m", options)
            memory = [metrics(url)["process_resident_memory_bytes"]]
            quarter = threading.Timer(
                options.seconds / 4, lambda: memory.append(metrics(url)["process_resident_memory_bytes"])
            )
            quarter.start()
            began = time.monotonic()
            load.run()
            took = time.monotonic() - began
            quarter.join()
            time.sleep(1)
            after = metrics(url)
            memory.append(after["process_resident_memory_bytes"])
            process.terminate()
            process.stderr.read()
            code = process.wait(60)
    ordered = sorted(load.seconds)
    answer = {
        "case": "serving", "clients": options.clients, "seconds": round(took, 1), **load.counts,
        "errors": load.counts["errors"], "tokens_per_second": round(load.counts["tokens"] / took, 1),
        "median_seconds": round(statistics.median(ordered), 3),
        "p99_seconds": round(ordered[int(0.99 * (len(ordered) - 1))], 3),
        "memory_mib": [round(value / 2**20) for value in memory], "active_rows_after": after["loopos_active_rows"],
        "exit_code": code, "told": dict(load.errors.most_common(3)),
    }  # fmt: skip
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
