"""Every method and every change of weights at pico size, run through the command line, as one JSON value.

`python tests/golden/record.py FOLDER` runs them in FOLDER, which must not exist, and prints the value: what each run
logged, the texts and scores that its model gives, and the SHA-256 of each tensor file. On one machine two versions of
the code that compute the same print the same bytes; `test_golden.py` compares the numbers with those of `values.json`,
which another processor reaches up to rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LOOPOS_NO_REEXEC"] = "1"

OPENINGS = ("good", "bad", "where")
ENDINGS = ("the parcel came late", "a kind answer", "my card was charged", "the film was slow", "cold food again")
LOGGED = ("step", "validation", "rollout")
CLOCKED = ("seconds", "tokens_per_second", "time", "duration")
PLAIN = {"optimizer": "adamw", "precision": "fp32", "device": "cpu", "seed": 5, "batch_size": 8, "num_epochs": 1}
# Of methods whose default is another schedule.
FLAT = {"schedule": "constant", "warmup": 0}


class Recorder:
    """Runs commands below one folder. `values` grows by what each gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = {}

    def run(self, *arguments: object) -> str:
        """The standard output of `loopos ARGUMENTS`. Raises RuntimeError where it fails."""
        from loopos.cli.app import main

        out, err = io.StringIO(), io.StringIO()
        words = ["loopos", *map(str, arguments)]
        code: Any = 0
        with patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as exit_:
                code = exit_.code
        if code not in (0, None):
            raise RuntimeError(f"{' '.join(words)}: exit code {code}\n{err.getvalue()}{out.getvalue()}")
        return out.getvalue()

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        file = self.folder / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    def train(self, name: str, method: str, *, mode: str = "posttraining", **sections: Mapping[str, Any]) -> Path:
        """A run of this method in the folder `name`, recorded: logged numbers and tensor files."""
        run = self.folder / name
        config = {
            **sections,
            "computation": {"mode": mode, "method": method},
            "training": {**PLAIN, **({} if method == "ppo" else FLAT), **sections["training"]},
            "data": {**sections["data"], "output_dir": str(run)},
        }
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        self.run("train", file, "--quiet")
        for events in sorted(run.rglob("events.jsonl")):
            key = f"{name}/{events.parent.relative_to(run)}".removesuffix("/.")
            self.values[key] = logged(events)
        self.files(name)
        return run

    def files(self, name: str) -> None:
        """Records the hashes of the tensor files below the folder `name`."""
        found = {
            str(each.relative_to(self.folder)): tensors_hash(each)
            for each in sorted((self.folder / name).rglob("*"))
            if each.suffix in (".safetensors", ".gguf", ".bin")
        }
        assert found, name
        self.values[f"{name} files"] = found


def tensors_hash(file: Path) -> str:
    """SHA-256 of a tensor file; of .safetensors over names and tensors in order, without the metadata."""
    if file.suffix != ".safetensors":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    import torch
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def logged(events: Path) -> list[Any]:
    """Kind, step and figures of all that a run measured, in order; clocks are left out."""
    rows = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    return [
        [row["event"], row["step"], {k: v for k, v in row["metrics"].items() if not _is_clock(k)}]
        for row in rows
        if row["event"] in LOGGED
    ]


def _is_clock(name: str) -> bool:
    return any(each in name for each in CLOCKED) or name.startswith("memory")


def numbers(value: Any) -> Any:
    """`value` with NaN as text, so that equal values are equal."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: numbers(each) for key, each in value.items()}
    return [numbers(each) for each in value] if isinstance(value, list) else value


def write_model(folder: Path, *, kind: str = "llama", seed: int = 0) -> Path:
    """A random model of 2 layers and a byte-level tokenizer of 300 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{a} {b}" for a in OPENINGS for b in ENDINGS], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=256
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 256, "initializer_range": 0.1, "pad_token_id": 0}
    if kind == "bert":
        zero = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        BertModel(BertConfig(**sizes, **zero)).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)).save_pretrained(
            folder
        )
    return folder


def heads(recorder: Recorder, llama: Path, bert: Path) -> list[Path]:
    """Classification in full, with LoRA, of several labels; regression. The two classifiers of one base are returned."""
    rows = [{"text": f"{OPENINGS[i % 3]} {ENDINGS[(i * 7) % 5]} {i}", "label": OPENINGS[i % 3]} for i in range(40)]
    classes = {"training_data": str(recorder.write("classes.jsonl", rows))}
    numbers_ = [{"text": row["text"], "label": i % 3 + 0.25 * (i % 5)} for i, row in enumerate(rows)]
    values = {"training_data": str(recorder.write("values.jsonl", numbers_))}
    many = [{"text": row["text"], "label": [row["label"]] + ["late"] * (i % 2)} for i, row in enumerate(rows)]
    several = {"training_data": str(recorder.write("several.jsonl", many))}
    recorder.train("full", "fine_tuning", training={"learning_rate": 0.01, "num_epochs": 2}, data=classes | _of(llama))
    recorder.train(
        "lora",
        "fine_tuning",
        training={"learning_rate": 0.02, "trainable": "lora", "gradient_accumulation": 2, "schedule": "cosine"},
        data=classes | _of(llama),
    )
    recorder.train("regression", "fine_tuning", training={"learning_rate": 0.01}, data=values | _of(llama))
    recorder.train("labels", "fine_tuning", training={"learning_rate": 0.01}, data=several | _of(bert))
    for name in ("full", "regression", "labels"):
        recorder.values[f"{name} predict"] = recorder.run("predict", recorder.folder / name, classes["training_data"])
    return [recorder.folder / "full", recorder.folder / "lora"]


def language(recorder: Recorder, llama: Path) -> None:
    """Supervised fine-tuning of reasoning, chats and completions, and pretraining; texts of each."""
    problems = [
        {"problem": f"add {a} and {b}", "reasoning": [f"{a} + {b} = {a + b}"] * (1 + a % 2), "answer": str(a + b)}
        for a in range(1, 6)
        for b in range(1, 6)
    ]
    chats = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": f"{two}, {one}"}]}
        for one in ENDINGS
        for two in OPENINGS
    ]
    recorder.train(
        "steps",
        "chain_of_thought",
        training={"learning_rate": 0.02},
        data={"reasoning_examples": str(recorder.write("problems.jsonl", problems)), **_of(llama)},
        generation={"max_new_tokens": 8, "temperature": 0.7},
        evaluation={"problems": 3},
    )
    recorder.train(
        "chats",
        "chain_of_thought",
        training={"learning_rate": 0.02, "trainable": "lora", "validate_every": 1},
        data={"reasoning_examples": str(recorder.write("chats.jsonl", chats)), "chat_template": "plain", **_of(llama)},
    )
    text = recorder.folder / "text.txt"
    text.write_text("\n\n".join(f"{a} {b} {a}" for a in OPENINGS for b in ENDINGS), encoding="utf-8")
    recorder.train(
        "pretrained",
        "autoregressive",
        mode="pretraining",
        model={"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 48, "vocab_size": 300},
        training={"learning_rate": 0.01, "max_length": 24},
        data={"input_file": str(text), "output_weights": str(recorder.folder / "pretrained.bin")},
    )
    completions = [{"prompt": f"{one}: ", "completion": f"{two}, {one}"} for one in ENDINGS for two in OPENINGS]
    recorder.train(
        "sft",
        "sft",
        training={"learning_rate": 0.02, "num_epochs": 2},
        data={"training_data": str(recorder.write("completions.jsonl", completions)), "split_by": "row", **_of(llama)},
        generation={"max_new_tokens": 8, "temperature": 0.7},
    )
    for name in ("steps", "chats", "sft"):
        recorder.values[f"{name} texts"] = texts(recorder, recorder.folder / name)
    recorder.values["strategies"] = [
        recorder.run("generate", recorder.folder / "steps", "-p", "add 2 and 3", "--json", *options)
        for options in (
            ("--strategy", "self_consistency:3", "--temperature", "0.9", "--max-new-tokens", "8"),
            ("--strategy", "step_beam:2x2", "--temperature", "0.9", "--max-new-tokens", "12"),
        )
    ]


def texts(recorder: Recorder, model: Path) -> list[str]:
    """Greedy, sampled and searched texts of a model."""
    few = ("-p", "good", "-p", "where a kind", "--max-new-tokens", "8", "--json")
    return [
        recorder.run("generate", model, *few, *options)
        for options in (
            (),
            ("--temperature", "0.9", "--top-p", "0.9", "-n", "2", "--seed", "3"),
            ("--num-beams", "3"),
            ("--temperature", "1.2", "--top-k", "20", "--repetition-penalty", "1.2", "--raw"),
        )
    ]


def feedback(recorder: Recorder, llama: Path) -> None:
    """A reward model, PPO with four models and with one, and both phases of RLHF."""
    pairs = [
        {"prompt": f"{ENDINGS[i % 5]} {i // 5}", "chosen": ENDINGS[(i + 1) % 5], "rejected": OPENINGS[i % 3]}
        for i in range(32)
    ]
    compared = str(recorder.write("pairs.jsonl", pairs))
    asked = str(recorder.write("prompts.jsonl", [{"prompt": each} for each in ENDINGS]))
    judge = recorder.train(
        "reward",
        "reward_model",
        training={"learning_rate": 0.01},
        data={"preference_data": compared, "validation_share": 0.2, **_of(llama)},
    )
    recorder.values["score"] = recorder.run("score", judge, compared)
    policy = {"learning_rate": 1e-3, "max_iterations": 2, "num_epochs": 9, "inner_epochs": 2, "minibatches": 2}
    online = {"prompts": asked, "validation_share": 0.2, "reward_model": str(judge), **_of(llama)}
    recorder.train("ppo", "ppo", training=policy, data=online, generation={"max_new_tokens": 8})
    recorder.train(
        "ppo_lora",
        "ppo",
        training={**policy, "trainable": "lora", "value_model": "shared"},
        data=online,
        generation={"max_new_tokens": 8, "temperature": 0.8},
    )
    recorder.values["ppo texts"] = texts(recorder, recorder.folder / "ppo")


def changed(recorder: Recorder, llama: Path, other: Path, classifiers: list[Path]) -> None:
    """Merges, pruned, quantized and exported models, and an ensemble."""
    text = recorder.folder / "calibration.txt"
    text.write_text("\n".join(f"{a}. {b}!" for a in ENDINGS for b in ENDINGS), encoding="utf-8")
    read = ("--calibration-rows", 4, "--calibration-tokens", 16)
    for method in ("linear", "slerp", "ties", "task_arithmetic"):
        base = () if method in ("linear", "slerp") else ("--base", llama)
        weights = () if method == "slerp" else ("--weight", 0.7, "--weight", 0.4)
        out = recorder.folder / f"merged_{method}"
        recorder.run(
            "merge",
            llama if not base else recorder.folder / "steps",
            other,
            *base,
            "--method",
            method,
            *weights,
            "-o",
            out,
        )
        recorder.files(out.name)
    for method in ("magnitude", "wanda", "sparsegpt", "heads", "channels", "layers"):
        out = recorder.folder / f"pruned_{method}"
        source = () if method == "magnitude" else ("--calibration", text, *read)
        recorder.run("prune", llama, "--method", method, "--sparsity", 0.5, *source, "-o", out)
        recorder.files(out.name)
    for method, rounding in (("int8", "none"), ("int4", "none"), ("int4", "gptq"), ("int4", "awq")):
        out = recorder.folder / f"{method}_{rounding}"
        source = () if rounding == "none" else ("--calibration", rounding, "--calibration-text", text, *read)
        grouped = ("--group-size", 32) if method == "int4" else ()
        recorder.run("quantize", llama, "--method", method, *grouped, *source, "-o", out)
        recorder.files(out.name)
    for name, format_ in (("steps", "huggingface"), ("full", "huggingface"), ("lora", "adapter"), ("chats", "gguf")):
        out = recorder.folder / f"{name}_{format_}"
        recorder.run("export", recorder.folder / name, "--format", format_, "-o", out)
        recorder.files(out.name)
    joined = recorder.folder / "joined"
    recorder.run("ensemble", *classifiers, "-o", joined)
    recorder.values["ensemble predict"] = recorder.run("predict", joined, recorder.folder / "classes.jsonl")


def _of(weights: Path) -> dict[str, str]:
    return {"pretrained_weights": str(weights)}


def record(folder: Path) -> dict[str, Any]:
    """All values. folder: where the runs go; it must not exist."""
    folder.mkdir(parents=True)
    recorder = Recorder(folder)
    llama, other = write_model(folder / "llama"), write_model(folder / "other", seed=1)
    classifiers = heads(recorder, llama, write_model(folder / "bert", kind="bert"))
    language(recorder, llama)
    feedback(recorder, llama)
    changed(recorder, llama, other, classifiers)
    # The folder's name stands in some outputs.
    plain: dict[str, Any] = json.loads(json.dumps(numbers(recorder.values)).replace(str(folder), "FOLDER"))
    return plain


if __name__ == "__main__":
    print(json.dumps(record(Path(sys.argv[1])), indent=1, sort_keys=True))
