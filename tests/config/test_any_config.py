"""Whatever a file holds, `load` gives a config or `ConfigError`, never another exception."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos.config.diagnostics import ConfigError
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.load import Methods, load
from loopos.config.sections import ComputationSection, MethodConfig


class OtherConfig(MethodConfig):
    computation: ComputationSection


TWO_METHODS: Methods = {
    ("posttraining", "fine_tuning"): FineTuningConfig,
    ("pretraining", "autoregressive"): OtherConfig,
}

ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["a/b", "/", "*", "~", "new"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["model", "computation", "training", "data", "mode", "method", "columns", "lora", "$schema", "betas"]
            )
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.fixture(scope="session")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


def config_or_diagnostics(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        loaded = load(path, [], TWO_METHODS)
    except ConfigError as error:
        message, diagnostics = str(error), error.diagnostics
    else:
        assert isinstance(loaded.config, MethodConfig)
        return
    assert message.encode()
    assert all(diagnostic.actual and diagnostic.source == str(path) for diagnostic in diagnostics)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(value=ANY_JSON)
def test_any_json_is_a_config_or_diagnostics(held: Path, value: object) -> None:
    config_or_diagnostics(held / "any.json", json.dumps(value).encode())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_good_config_with_swapped_values_is_a_config_or_diagnostics(
    held: Path, good: str, data: st.DataObject
) -> None:
    sections = json.loads(good)
    for _ in range(data.draw(st.integers(1, 4))):
        section = data.draw(st.sampled_from(sorted(sections)))
        if isinstance(sections[section], dict) and sections[section]:
            known = FineTuningConfig.model_fields[section].annotation
            assert known is not None
            key = data.draw(st.sampled_from(sorted({*sections[section], *known.model_fields})))
            sections[section][key] = data.draw(ANY_JSON)
        else:
            sections[section] = data.draw(ANY_JSON)
    config_or_diagnostics(held / "swapped.json", json.dumps(sections).encode())


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_a_good_config_with_changed_bytes_is_a_config_or_diagnostics(
    held: Path, good: str, data: st.DataObject
) -> None:
    text = bytearray(good.encode())
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(text) - 1))
        end = min(len(text), start + data.draw(st.integers(0, 3)))
        text[start:end] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"{", b'"', b",", b"9", b"-", b"\\", b"e"])
        )
    name = data.draw(st.sampled_from(["bytes.json", "bytes.yaml"]))
    config_or_diagnostics(held / name, bytes(text))
