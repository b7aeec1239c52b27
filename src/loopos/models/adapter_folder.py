"""Reads and checks the folder of a PEFT adapter, which anyone may have written, without importing peft.

Regular expressions of the config can take arbitrarily long on a short name, so expressions with repetition run in a
separate process with a time limit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopos.config.diagnostics import UserError
from loopos.config.paths import expanded
from loopos.models.resolve import ADAPTER_CONFIG
from loopos.storage.json_files import read_object
from loopos.storage.manifest import check_manifest
from loopos.storage.tensor_files import StoredTensor, stored_tensors

TIME_LIMIT = 5.0
"""Seconds that all expressions of an adapter together may take."""
# How peft reads them, by the key of its config.
_FORMS = {
    "target_modules": r"(?:{})\Z",
    "exclude_modules": r"(?:{})\Z",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
_REPEATS = re.compile(r"[*+{]")
_CHILD = """
import json, re, sys
names, patterns = json.load(sys.stdin)
for key, pattern, form in patterns:
    print(json.dumps([key, pattern]), flush=True)
    compiled = re.compile(form.replace("{}", pattern))
    print(json.dumps([index for index, name in enumerate(names) if compiled.match(name)]), flush=True)
"""


def matches(file: Path, patterns: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[tuple[str, str], set[str]]:
    """(key, expression) → the names that it matches, as peft reads the expressions under a key of its config. file: the
    config, for messages. Raises `UserError` for an invalid expression, or one that takes longer than `TIME_LIMIT`.
    """
    found: dict[tuple[str, str], set[str]] = {}
    slow = []
    for key, each in ((key, each) for key, several in patterns.items() for each in several):
        try:
            compiled = re.compile(_FORMS[key].replace("{}", each))
        except (re.error, OverflowError, RecursionError) as problem:
            raise UserError(
                f"{file}: {key}: expected a regular expression, got {_pattern_text(each)}: {problem}"
            ) from problem
        if _REPEATS.search(each):
            slow.append((key, each, _FORMS[key]))
        else:
            found[key, each] = {name for name in names if compiled.match(name)}
    return found | _matched_apart(file, slow, names) if slow else found


def _matched_apart(
    file: Path, patterns: Sequence[tuple[str, str, str]], names: Sequence[str]
) -> dict[tuple[str, str], set[str]]:
    try:
        process = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([list(names), patterns]),
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=True,
        )
    except subprocess.TimeoutExpired as problem:
        lines = (problem.stdout or b"").decode().splitlines()
        key, pattern = json.loads(lines[-1]) if lines and lines[-1].startswith('["') else patterns[0][:2]
        raise UserError(
            f"{file}: {key}: {_pattern_text(pattern)} takes over {TIME_LIMIT:g} seconds to match the names of the "
            "model's modules; expected a simpler regular expression"
        ) from problem
    except subprocess.CalledProcessError as problem:
        last = (problem.stderr.splitlines() or ["no reason"])[-1]
        raise UserError(f"{file}: its regular expressions cannot be matched: {last}") from problem
    lines = process.stdout.splitlines()
    return {
        (key, pattern): {names[index] for index in json.loads(line)}
        for (key, pattern, _), line in zip(patterns, lines[1::2], strict=True)
    }


def _pattern_text(pattern: str) -> str:
    return repr(pattern) if len(pattern) <= 60 else f"{pattern[:57]!r}..."


ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the name of every module."""
_LORA_PAIR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
_DOWN = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_A\.weight")
_MOST_LAYERS = 10_000
# Ways to start an adapter that leave the weights under it as they are. The others (PiSSA, OLoRA, CorDA, LoftQ …) take
# their start out of the base's weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# Those that give the same start again from the base. A decomposition that draws random numbers, gradients or
# activations of training data do not.
REPEATED_STARTS = (*_PLAIN_STARTS, "pissa", "olora", "loftq")
# Keys of a LoRA's config that do not change what scale·B·A means.
_PLAIN_KEYS = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
        "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
        "megatron_core", "qalora_group_size", "eva_config", "loftq_config", "corda_config", "lora_ga_config",
        "ensure_weight_tying",
    }
)  # fmt: skip


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _listed(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(each) is kind for each in value)


def _mapped(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(fits(each) for each in value.values())


def _either(*fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(each(value) for each in fits)


def _of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


def _ranges(value: Any) -> bool:
    pairs = isinstance(value, list) and all(_listed(int)(each) and len(each) == 2 for each in value)
    return pairs and sum(max(0, end - start) for start, end in value) <= _MOST_LAYERS


_NAMES = (_either(_of(str), _listed(str)), "a text or a list of texts")
_FLAG = (_of(bool), "true or false")
_INDICES = (_either(_of(int), _listed(int)), "a whole number or a list of them")
# Key → whether a value will do, and what will. A value that is null is left to peft, but for those that LoRA needs.
_VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (_of(str), "the name of a method, such as LORA"),
    "task_type": (_of(str), "a text, such as CAUSAL_LM"),
    "base_model_name_or_path": (_of(str), "a text"),
    "r": (_either(_whole, lambda value: value == 0 and type(value) is int), "a whole number from 1"),
    "init_r": (_whole, "a whole number from 1"),
    "target_r": (_whole, "a whole number from 1"),
    "lora_alpha": (_number, "a number"),
    "alpha": (_number, "a number"),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "feedforward_modules": _NAMES,
    "modules_to_save": (_listed(str), "a list of texts"),
    "target_parameters": (_listed(str), "a list of texts"),
    "layers_to_transform": _INDICES,
    "alpha_pattern": (_mapped(_number), "names and a number for each"),
    "rank_pattern": (_mapped(_either(_whole, _listed(bool))), "names and a whole number from 1 for each"),
    "trainable_token_indices": (_either(_listed(int), _mapped(_listed(int))), "a list of whole numbers"),
    "layer_replication": (_ranges, f"a list of ranges [start, end] of at most {_MOST_LAYERS:,} layers"),
    "bias": (lambda value: value in ("none", "all", "lora_only") or "_" in str(value), "none, all or lora_only"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "fan_in_fan_out": _FLAG,
}
_NEEDED = ("r", "lora_alpha")


@dataclass(frozen=True)
class AdapterFolder:
    """`source`: as the user named it. `config`: adapter_config.json. `tensors`: by their names in the file."""

    source: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def base(self) -> str | None:
        """The model that it was trained on, according to its config."""
        named = self.config.get("base_model_name_or_path")
        return str(named) if named else None

    @property
    def method(self) -> str:
        """peft's name of the kind of adapter."""
        return str(self.config.get("peft_type"))

    @property
    def task(self) -> str | None:
        return self.config.get("task_type")

    @property
    def fingerprint(self) -> str:
        """A digest of what the adapter does to its base, as 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for key in sorted(self.tensors):
            digest.update(f"{key} {list(self.tensors[key].spec.shape)}".encode())
            digest.update(self.tensors[key].read().float().numpy().tobytes())
        scales = {key: self.config.get(key) for key in ("r", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora")}
        digest.update(json.dumps(scales, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    @property
    def beyond_lora(self) -> list[str]:
        """What makes it more than scale·B·A on linear layers of the unchanged base; empty for plain LoRA."""
        if self.method != "LORA":
            return [f"peft_type {self.method}"]
        found = [
            key if value is True else f"{key} {_shown(value)}"
            for key, value in self.config.items()
            if key not in _PLAIN_KEYS and value not in (None, False, "none") and value != [] and value != {}
        ]
        if (start := self.config.get("init_lora_weights", True)) not in _PLAIN_STARTS:
            found.append(f"init_lora_weights {start}")
        for key, stored in self.tensors.items():
            if _LORA_PAIR.fullmatch(key) is None or len(stored.spec.shape) != 2:
                found.append(f"the tensor {key}")
        return found

    def lora_pairs(self) -> dict[str, tuple[StoredTensor, StoredTensor, float]]:
        """For plain LoRA: module → (A, B, scale), with scale = alpha/r, or alpha/√r for rsLoRA. Raises `UserError`."""
        parts: dict[str, dict[str, StoredTensor]] = {}
        for key, stored in self.tensors.items():
            match = _LORA_PAIR.fullmatch(key)
            assert match is not None
            parts.setdefault(match[1], {})[match[2]] = stored
        if halves := [name for name, pair in parts.items() if len(pair) < 2]:
            raise UserError(f"{self.source}: {halves[0]} with one of its two matrices; expected both")
        for name, pair in parts.items():
            if pair["A"].spec.shape[0] != pair["B"].spec.shape[1]:
                raise UserError(f"{self.source}: {name}: lora_A has rank {pair['A'].spec.shape[0]}, lora_B has rank "
                                f"{pair['B'].spec.shape[1]}; expected one rank")  # fmt: skip
        alphas = self.by_pattern("alpha_pattern", self.config["lora_alpha"], list(parts))
        rooted = bool(self.config.get("use_rslora"))
        return {
            name: (pair["A"], pair["B"], float(alphas[name]) / _divisor(pair["A"].spec.shape[0], rooted=rooted))
            for name, pair in parts.items()
        }

    def by_pattern(self, key: str, usual: Any, modules: list[str]) -> dict[str, Any]:
        """Module → the value of the first pattern under `key` that matches it, else the default."""
        patterns = self.config.get(key) or {}
        found = dict.fromkeys(modules, usual)
        matched = matches(self.folder / ADAPTER_CONFIG, {key: list(patterns)}, modules)
        for pattern in reversed(patterns):
            found |= dict.fromkeys(matched[key, pattern], patterns[pattern])
        return found

    def check_patterns(self, modules: list[str]) -> None:
        """Matches every regular expression of the config with the names of a model's modules. Raises `UserError` for an
        invalid or slow expression.
        """
        patterns: dict[str, list[str]] = {}
        for key in ("target_modules", "exclude_modules", "layers_pattern"):
            if isinstance(value := self.config.get(key), str):
                patterns[key] = [value]
        if isinstance(value := self.config.get("layers_pattern"), list):
            patterns["layers_pattern"] = value
        patterns["modules_to_save"] = self.config.get("modules_to_save") or []
        for key in ("rank_pattern", "alpha_pattern"):
            patterns[key] = list(self.config.get(key) or ())
        matches(self.folder / ADAPTER_CONFIG, patterns, modules)


def _divisor(rank: int, *, rooted: bool) -> float:
    return math.sqrt(rank) if rooted else rank


def is_adapter(source: str | Path) -> bool:
    """Whether `source` is the folder of a PEFT adapter."""
    return (Path(expanded(os.fspath(source))) / ADAPTER_CONFIG).is_file()


def open_adapter_folder(source: str | Path) -> AdapterFolder:
    """The adapter in a folder. Raises `UserError` for a broken one, or for invalid config values."""
    folder = Path(expanded(os.fspath(source)))
    check_manifest(folder)
    config = read_object(folder / ADAPTER_CONFIG)
    wrong = list(_wrong_values(config))
    if wrong:
        raise UserError("\n".join(f"{folder / ADAPTER_CONFIG}: {each}" for each in wrong[:3]))
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{source}: no {ADAPTER_WEIGHTS}; expected an adapter saved as safetensors")
    tensors = stored_tensors([folder / ADAPTER_WEIGHTS])
    if not tensors:
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: holds no tensor; expected those of an adapter")
    found = AdapterFolder(str(source), folder, config, tensors)
    _check_ranks(found)
    return found


def _wrong_values(config: Mapping[str, Any]) -> Iterable[str]:
    if "peft_type" not in config:
        yield "peft_type: missing; expected the name of a method, such as LORA"
    needed = _NEEDED if config.get("peft_type") == "LORA" else ()
    for key, (fits, expected) in _VALUES.items():
        value = config.get(key)
        empty = key in needed and key in config and value in (None, 0)
        if empty or (value is not None and not fits(value)):
            yield f"{key}: expected {expected}, got {_shown(value)}"
        elif key in needed and key not in config:
            yield f"{key}: missing; expected {expected}"


def _check_ranks(adapter: AdapterFolder) -> None:
    """Raises `UserError` if the config's ranks differ from those of the weights, because memory is allocated for
    them.
    """
    file = adapter.folder / ADAPTER_CONFIG
    if adapter.method == "LORA":
        downs = {
            match[1]: stored.spec.shape[0]
            for key, stored in adapter.tensors.items()
            if (match := _DOWN.fullmatch(key)) and stored.spec.shape
        }
        ranks = adapter.by_pattern("rank_pattern", adapter.config["r"], list(downs))
        for module, rank in downs.items():
            if ranks[module] != rank:
                raise UserError(
                    f"{file}: r: got {ranks[module]} for {module}; expected {rank}, the rank of its weights"
                )
        if downs:
            return
    largest = max((size for stored in adapter.tensors.values() for size in stored.spec.shape), default=1)
    actual = {key: adapter.config.get(key) for key in ("r", "init_r", "target_r")}
    patterns = adapter.config.get("rank_pattern") or {}
    actual |= {f"rank_pattern.{name}": rank for name, rank in patterns.items() if type(rank) is int}
    for key, value in actual.items():
        if value is not None and value > max(largest, 4096):
            raise UserError(f"{file}: {key}: got {value}; expected at most {largest}, the longest side of its weights")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
