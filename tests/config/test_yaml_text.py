"""YAML 1.2 scalars, positions, and a table of broken texts."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos.config.diagnostics import ConfigError
from loopos.config.json_text import Mark, key_mark, plain, value_mark
from loopos.config.yaml_text import parse_yaml

SCALARS: list[tuple[str, object]] = [
    ("1e-5", 1e-5),
    ("1E5", 1e5),
    (".5", 0.5),
    ("5.", 5.0),
    ("-1.5e+3", -1500.0),
    ("1e", "1e"),
    ("16", 16),
    ("+16", 16),
    ("010", 10),
    ("0x1F", 31),
    ("0o17", 15),
    ("1_000", "1_000"),
    ("1:30", "1:30"),
    ("yes", "yes"),
    ("no", "no"),
    ("on", "on"),
    ("off", "off"),
    ("y", "y"),
    ("true", True),
    ("False", False),
    ("TRUE", True),
    ("tRUE", "tRUE"),
    ("null", None),
    ("~", None),
    ("", None),
    ("2026-01-01", "2026-01-01"),
    ("'16'", "16"),
    ('"true"', "true"),
    ("90s", "90s"),
    ("!!str 16", "16"),
    ("!!float 16", 16.0),
    ("-.INF", -math.inf),
    ("[1, a, [b]]", [1, "a", ["b"]]),
    ("|\n  two\n  lines\n", "two\nlines\n"),
]

# (text, line, column, piece of `actual`, piece of the hint)
BROKEN = [
    ("a: 1\na: 2\n", 2, 1, 'the key "a" a second time', "line 1"),
    ("a:\n  b: 1\n  b: 2\n", 3, 3, 'the key "b" a second time', "line 2"),
    ("a:\n\tb: 1\n", 2, 1, "a tab", "spaces"),
    ("a: b: c\n", 1, 5, "mapping values are not allowed", "quotes"),
    ("a: [1, 2\n", 2, 1, "not valid YAML", ""),
    ("a: 'b\n", 2, 1, "not valid YAML", ""),
    ("a: 1\n--- \nb: 2\n", 2, 1, "not valid YAML", "second document"),
    ("a: *missing\n", 1, 4, "undefined alias", ""),
    ("1: a\n", 1, 1, "a key that is not text", ""),
    ("null: a\n", 1, 1, "a key that is not text", ""),
    ("[a]: b\n", 1, 1, "a key that is not text", ""),
    ("a: !!python/object:os.system x\n", 1, 4, "the tag !!python/object:os.system", "remove the tag"),
    ("a: !mine x\n", 1, 4, "the tag !mine", "remove the tag"),
    ("a: !!int x\n", 1, 4, "the tag !!int", "remove the tag"),
    ("a: !!set {b}\n", 1, 4, "the tag !!set", ""),
    ("base: &b {x: 1}\na:\n  <<: *b\n", 3, 3, "a merge key", ""),
    ("a: &a [*a]\n", 1, 4, "levels", "alias"),
    ("a: \x07\n", 1, 4, "the character 0x7", ""),
    ("a: " + "[" * 600, 1, 1, "levels", ""),
    ("a: @x\n", 1, 4, "not valid YAML", ""),
    ("a: 1\n b: 2\n", 2, 3, "not valid YAML", ""),
    ("%YAML 9.9\n--- a", 1, 1, "not valid YAML", ""),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    node = parse_yaml(f"a: {text}", "a.yaml")
    assert node is not None
    read = plain(node)
    assert read == {"a": value}
    assert isinstance(read, dict)
    assert type(read["a"]) is type(value)


def test_not_a_number_is_a_float() -> None:
    node = parse_yaml(".nan", "a.yaml")
    assert node is not None
    read = plain(node)
    assert isinstance(read, float)
    assert math.isnan(read)


@pytest.mark.parametrize(("text", "line", "column", "actual_piece", "hint"), BROKEN)
def test_each_broken_text_has_one_diagnostic_at_its_position(
    text: str, line: int, column: int, actual_piece: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "a.yaml")
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.source, diagnostic.line, diagnostic.column) == ("a.yaml", line, column)
    assert actual_piece in diagnostic.actual
    assert hint in diagnostic.hint


def test_aliases_of_aliases_stop_at_a_bound() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 9)]
    with pytest.raises(ConfigError, match="100000 values"):
        parse_yaml("\n".join(lines), "a.yaml")


def test_an_anchor_is_used_at_its_alias() -> None:
    node = parse_yaml("a: &it [1, 2]\nb: *it\n", "a.yaml")
    assert node is not None
    assert plain(node) == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("text", ["# a comment alone\n", "\n\n"])
def test_a_text_without_a_value_is_none(text: str) -> None:
    assert parse_yaml(text, "a.yaml") is None


def test_positions_of_keys_and_values() -> None:
    root = parse_yaml("# first\na:\n  - 1\n  - b: two # here\n", "a.yaml")
    assert root is not None
    assert key_mark(root, ("a",)) == Mark("a.yaml", 2, 1)
    assert value_mark(root, ("a", 0)) == Mark("a.yaml", 3, 5)
    assert key_mark(root, ("a", 1, "b")) == Mark("a.yaml", 4, 5)
    assert value_mark(root, ("a", 1, "b")) == Mark("a.yaml", 4, 8)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab:- #1e", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab<1", max_size=3), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(JSON_VALUES, st.booleans())
def test_what_a_yaml_writer_writes_is_read_back(value: object, flow: bool) -> None:
    text = yaml.safe_dump(value, default_flow_style=flow, sort_keys=False)
    node = parse_yaml(text, "a.yaml")
    assert node is not None
    assert json.dumps(plain(node)) == json.dumps(value)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(alphabet="ab:-[]{}&*!|>'\"%@#,? \n\t1.e~<\x00\x07\ufeff\u2028", max_size=30))
def test_any_text_is_a_tree_or_a_diagnostic(text: str) -> None:
    try:
        node = parse_yaml(text, "a.yaml")
    except ConfigError as error:
        num_diagnostics = len(error.diagnostics)
    else:
        assert node is None or node.mark.source == "a.yaml"
        return
    assert num_diagnostics >= 1
