"""The keys of `data` that say how files are read: encodings by name, bounds, one source."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loopos.config.checks import is_text_encoding
from loopos.config.diagnostics import ConfigError
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.load import Methods, load
from loopos.config.rlhf import RlhfConfig

METHODS: Methods = {("posttraining", "fine_tuning"): FineTuningConfig}


def _config(folder: Path, **data: Any) -> Path:
    (folder / "a.jsonl").write_text('{"text": "a", "label": 1}\n')
    content = {
        "model": {},
        "computation": {"mode": "posttraining", "method": "fine_tuning"},
        "training": {"learning_rate": 0.01},
        "data": {
            "pretrained_weights": "smollm2-135m",
            "training_data": str(folder / "a.jsonl"),
            "output_dir": str(folder / "run"),
            **data,
        },
    }
    (folder / "c.json").write_text(json.dumps(content))
    return folder / "c.json"


@pytest.mark.parametrize(
    ("data", "piece"),
    [
        ({"encoding": "cp125"}, 'data.encoding: got "cp125"; expected the name of a text encoding'),
        ({"encoding": "base64"}, "data.encoding"),
        ({"max_line_bytes": 0}, "data.max_line_bytes"),
        ({"max_expansion": "2"}, "data.max_expansion"),
        ({"split_by": "text"}, "data.split_by"),
        ({"training_data": ["a.jsonl", "b.jsonl"]}, 'name one source: a folder, or a glob such as "data/*.jsonl"'),
    ],
)
def test_a_wrong_value_is_a_diagnostic(data: dict[str, Any], piece: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(_config(tmp_path, **data), [], METHODS)
    assert piece in str(caught.value)


def test_a_pipe_named_as_data_is_a_diagnostic(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match=r'data\.training_data: got ".*p\.jsonl", a named pipe'):
        load(_config(tmp_path, training_data=str(tmp_path / "p.jsonl")), [], METHODS)


def test_good_values_load(tmp_path: Path) -> None:
    loaded = load(_config(tmp_path, encoding="cp1252", max_line_bytes=10, max_expansion=3, split_by="row"), [], METHODS)
    assert isinstance(loaded.config, FineTuningConfig)
    data = loaded.config.data
    assert (data.encoding, data.max_line_bytes, data.max_expansion, data.split_by) == ("cp1252", 10, 3, "row")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("utf-8", True), ("UTF16", True), ("cp1252", True), ("shift_jis", True), ("big5", True), ("koi8-r", True)]
    + [(name, False) for name in ("", "nope", "base64", "hex", "rot13", "zip", "idna", "punycode", "unicode_escape")],
)
def test_what_is_a_text_encoding(name: str, expected: bool) -> None:
    assert is_text_encoding(name) is expected


def test_both_phases_of_rlhf_read_by_the_same_keys() -> None:
    config = RlhfConfig.model_validate(
        {
            "computation": {"mode": "posttraining", "method": "rlhf"},
            "training": {"learning_rate": 1e-5},
            "data": {
                "pretrained_weights": "smollm2-135m",
                "preference_data": "pairs.csv",
                "output_dir": "run",
                "encoding": "cp1252",
                "max_line_bytes": 5,
                "split_by": "row",
            },
        }
    )
    for data in (config.reward_model_config().data, config.ppo_config().data):
        assert (data.encoding, data.max_line_bytes, data.split_by) == ("cp1252", 5, "row")
    with_prompts = config.model_copy(update={"data": config.data.model_copy(update={"prompts": "prompts.txt"})})
    data = with_prompts.ppo_config().data
    assert (data.encoding, data.max_line_bytes, data.plain_lines) == (None, 5, "prompt")
