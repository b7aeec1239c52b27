"""Check that the files and folders that a config names exist, without opening them.

Each check yields `Problem`s that say what is missing and how to get it. Relative paths start at the current directory;
hub ids are not looked up.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence

from loopos.config.diagnostics import Problem
from loopos.config.source import close_files, close_matches, special_file

EMBEDDED_WEIGHTS = "smollm2-135m"
NEW_WEIGHTS = "new"
MODEL_DESCRIPTION = "loopos.json"
"""The file that describes the trained model in its folder."""
HEAD_FILE = "head.safetensors"
"""The weights of a model's head."""
MANIFEST = "loopos-manifest.json"
"""The file in a model or adapter folder with the size and SHA-256 of the other files."""
RECIPE = "recipe.json"
"""The recipe of a merged, pruned, ensemble or exported model, from which it can be made again."""
WEIGHT_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt")
DATA_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".parquet", ".arrow")
COMPRESSED_SUFFIXES = (".gz", ".zst")
_WEIGHTS_EXPECTED = (
    f'"{EMBEDDED_WEIGHTS}", "{NEW_WEIGHTS}", a folder, a .gguf, .safetensors or .bin file, or a hub id "org/name"'
)
_WEIGHTS_HINT = (
    f'write "{EMBEDDED_WEIGHTS}" for the embedded model, or make weights first: loopos train configs/pretraining.json'
)
_DATA_EXPECTED = (
    "a file, folder or glob of csv, tsv, json, jsonl, txt, parquet or arrow (text also .gz, .zst), or a hub id"
)
TASKS = "reasoning-gym:"
"""Begins a source of rows that reasoning-gym makes: "reasoning-gym:chain_sum?size=2000&seed=1"."""
ENVIRONMENT_ROWS = "environment:"
"""Begins a source of rows that an environment makes: "environment:calculator_search?number=2000&seed=1"."""
_TASK = re.compile(rf"(?:{TASKS}|{ENVIRONMENT_ROWS})\w+(\?\w+=[^&]*(&\w+=[^&]*)*)?")


def expanded(value: str) -> str:
    """`value` with a leading "~" replaced by the home folder, as in a shell; "./~" is a folder of that name.

    "~" of an unknown user stays; `check_output_folder` refuses it.
    """
    return os.path.expanduser(value) if value.startswith("~") else value


def looks_like_path(value: str, suffixes: Sequence[str]) -> bool:
    """Whether `value` names a file or folder rather than a hub id `org/name`.

    True if it exists, ends in one of `suffixes`, starts with `.`, `/` or `~`, has a backslash or more than one slash,
    or if its first part is a folder.
    """
    if os.path.exists(value) or value.lower().endswith(tuple(suffixes)):
        return True
    if value.startswith((".", "/", "~")) or "\\" in value or value.count("/") > 1:
        return True
    return "/" in value and os.path.isdir(value.split("/", maxsplit=1)[0])


def is_hub_id(value: str) -> bool:
    """Whether `value` has the form `org/name`."""
    organization, slash, name = value.partition("/")
    allowed = organization and name and not set(value) & set(" \t\n:*?[]\0")
    return bool(slash and allowed and "/" not in name)


def is_bare_weights(value: str) -> bool:
    """Whether `value` is a weights file without a config.json next to it, so that its sizes are not known."""
    bare = value.lower().endswith((".safetensors", ".bin", ".pt")) and os.path.isfile(value)
    return bare and not os.path.isfile(os.path.join(os.path.dirname(value), "config.json"))


def check_weights(field: str, value: str) -> Iterator[Problem]:
    """Check a value of `pretrained_weights`."""
    if value in (EMBEDDED_WEIGHTS, NEW_WEIGHTS):
        return
    if looks_like_path(value, WEIGHT_SUFFIXES):
        if not os.path.exists(value):
            yield Problem((field,), _missing(value), _WEIGHTS_EXPECTED, _with_close(value, _WEIGHTS_HINT))
        elif os.path.isfile(value) and not value.lower().endswith(WEIGHT_SUFFIXES):
            yield Problem((field,), f'"{value}", a file of another kind', _WEIGHTS_EXPECTED)
        elif not os.access(value, os.R_OK):
            yield Problem(
                (field,),
                f'"{value}", which is not readable',
                _WEIGHTS_EXPECTED,
                "change its permissions",
            )
    elif not is_hub_id(value):
        close = close_matches(value, (EMBEDDED_WEIGHTS, NEW_WEIGHTS))
        hint = f'did you mean "{close[0]}"?' if close else f'a hub id has the form "org/name"; {_WEIGHTS_HINT}'
        yield Problem((field,), f'"{value}"', _WEIGHTS_EXPECTED, hint)


def check_adapter(field: str, value: str) -> Iterator[Problem]:
    """Check the folder of a PEFT adapter, or of a run that has one."""
    folders = [value.replace("\0", ""), os.path.join(value.replace("\0", ""), "adapter")]
    if not any(os.path.isfile(os.path.join(folder, "adapter_config.json")) for folder in folders):
        actual = f'"{value}", which has no adapter_config.json' if os.path.exists(folders[0]) else _missing(value)
        yield Problem((field,), actual, 'a PEFT folder, or the output_dir of a run with "trainable": "lora"')


def check_tokenizer(field: str, value: str) -> Iterator[Problem]:
    """Check a value of `tokenizer`."""
    expected = f'"{EMBEDDED_WEIGHTS}", a folder, a tokenizer.json or .gguf file, or a hub id "org/name"'
    if value == EMBEDDED_WEIGHTS:
        return
    if looks_like_path(value, (".json", ".gguf", ".model")):
        if not os.path.exists(value):
            yield Problem((field,), _missing(value), expected, _with_close(value, f'or write "{EMBEDDED_WEIGHTS}"'))
    elif not is_hub_id(value):
        yield Problem((field,), f'"{value}"', expected, 'a hub id has the form "org/name"')


def check_rows(field: str, value: str, example: str) -> Iterator[Problem]:
    """Check a data source; `example` is one row as JSON, for the hint."""
    hint = f"one row looks like {example}"
    if value.startswith((TASKS, ENVIRONMENT_ROWS)) and not os.path.exists(value):
        if _TASK.fullmatch(value) is None:
            example = f"{TASKS}chain_sum?size=2000&seed=1"
            if value.startswith(ENVIRONMENT_ROWS):
                example = f"{ENVIRONMENT_ROWS}calculator_search?number=2000&seed=1"
            expected = f'a task and its settings, such as "{example}"'
            yield Problem((field,), f'"{value}"', expected)
        return
    is_glob = glob.has_magic(value) and not os.path.exists(value)
    if "\0" in value:
        yield Problem((field,), f'"{value}"', _DATA_EXPECTED, hint)
    elif is_glob:
        if next(glob.iglob(value, recursive=True), None) is None:
            yield Problem((field,), f'"{value}", a glob that matches no file', _DATA_EXPECTED, hint)
    elif looks_like_path(value, (*DATA_SUFFIXES, *COMPRESSED_SUFFIXES)):
        if not os.path.exists(value):
            yield Problem((field,), _missing(value), _DATA_EXPECTED, _with_close(value, hint))
        elif kind := special_file(value):
            yield Problem((field,), f'"{value}", {kind}', _DATA_EXPECTED, "write the data into a file first")
        elif not os.access(value, os.R_OK):
            yield Problem((field,), f'"{value}", which is not readable', _DATA_EXPECTED, "change its permissions")
    elif not is_hub_id(value):
        yield Problem(
            (field,), f'"{value}", which does not exist', _DATA_EXPECTED, f'a hub id has the form "org/name"; {hint}'
        )


def check_output_folder(field: str, value: str) -> Iterator[Problem]:
    """Check the output folder of a run."""
    expected = "a folder, new or of an earlier run"
    if "\0" in value:
        yield Problem((field,), f'"{value}"', expected)
        return
    if value.startswith("~"):
        yield Problem((field,), f'"{value}", the home folder of an unknown user', expected)
        return
    above = os.path.abspath(value)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        which = "a file" if above == os.path.abspath(value) else f'below "{os.path.relpath(above)}", which is a file'
        yield Problem((field,), f'"{value}", {which}', expected, "choose another name")
    elif not os.access(above, os.W_OK | os.X_OK):
        yield Problem(
            (field,),
            f'"{value}", in "{above}", which is not writable',
            expected,
            "choose another folder",
        )


def _missing(value: str) -> str:
    """The part that is missing: the file, or a folder of its path."""
    folder = os.path.dirname(value.rstrip("/"))
    if value.startswith("~"):
        return f'"{value}", the home folder of an unknown user'
    if folder and not os.path.isdir(folder):
        return f'"{value}" (there is no folder "{folder}")'
    return f'"{value}", which does not exist'


def _with_close(value: str, hint: str) -> str:
    close = close_files(value)
    return f'did you mean "{close[0]}"? Or {hint}' if close else hint
