"""Files that are no config text, the choice of JSON or YAML, and overrides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos.config.diagnostics import ConfigError
from loopos.config.json_text import MappingNode, Mark, parse_json, plain, value_mark
from loopos.config.source import apply_overrides, close_matches, parse_text, read_source

# (name, bytes, line, column, piece of `actual`)
BROKEN_FILES = [
    ("empty.json", b"", None, None, "without settings"),
    ("blank.json", b" \n\t\n", None, None, "without settings"),
    ("comment.yaml", b"# nothing yet\n", None, None, "without settings"),
    ("list.json", b"\n [1]", 2, 2, "a list"),
    ("list.yaml", b"- 1\n", 1, 1, "a list"),
    ("number.json", b"16", 1, 1, "a single value"),
    ("text.yaml", b"hello", 1, 1, "a single value"),
    ("bom.json", b"\xef\xbb\xbf{}", 1, 1, "byte-order mark"),
    ("bom.yaml", b"\xef\xbb\xbfa: 1", 1, 1, "byte-order mark"),
    ("utf16.json", "{}".encode("utf-16"), 1, 1, "UTF-16"),
    ("latin.json", '{\n "é": 1}'.encode("latin-1"), 2, 3, "the byte 0xe9 at offset 4"),
    ("binary.json", b"{\n\x00}", 2, 1, "a NUL byte"),
    ("huge.json", b" " * 10_000_001, None, None, "more than 10,000,000 bytes"),
]


@pytest.mark.parametrize(("name", "data", "line", "column", "actual_piece"), BROKEN_FILES)
def test_a_file_that_is_no_config_is_one_diagnostic(
    tmp_path: Path, name: str, data: bytes, line: int | None, column: int | None, actual_piece: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_source(path)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.source, diagnostic.line, diagnostic.column) == (str(path), line, column)
    assert actual_piece in diagnostic.actual


def test_a_missing_file_names_one_that_is_close(tmp_path: Path) -> None:
    (tmp_path / "fine_tuning.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"did you mean .*/fine_tuning\.json\?"):
        read_source(tmp_path / "fine_tunning.json")
    with pytest.raises(ConfigError, match="a folder"):
        read_source(tmp_path)
    with pytest.raises(ConfigError, match="a path that does not exist"):
        read_source(tmp_path / "no" / "folder.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_source(tmp_path / "fine_tuning.json" / "below.json")
    with pytest.raises(ConfigError, match="NUL"):
        read_source("a\0.json")


def test_the_suffix_says_the_language_and_else_the_content() -> None:
    with pytest.raises(ConfigError, match="a key in double quotes"):
        parse_text("{a: 1}", "a.json")
    for text, name in (
        ("{a: 1}", "a.yaml"),
        ("{a: 1}", "a.YML"),
        ('{"a": 1}', "a.conf"),
        ("a: 1", "a"),
        (" \n{a: 1}", "a.yml"),
    ):
        node = parse_text(text, name)
        assert node is not None
        assert plain(node) == {"a": 1}
    with pytest.raises(ConfigError, match="a key in double quotes"):
        parse_text("{a: 1}", "a.conf")


def overridden(text: str, *overrides: str) -> object:
    root = parse_json(text, "a.json")
    assert isinstance(root, MappingNode)
    return plain(apply_overrides(root, overrides))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["a.b=2"], {"a": {"b": 2}, "c": [1, 2], "n": None}),
        (["a.b=2", "a.b=3"], {"a": {"b": 3}, "c": [1, 2], "n": None}),
        (["a=x y=z"], {"a": "x y=z", "c": [1, 2], "n": None}),
        (["a.b="], {"a": {"b": ""}, "c": [1, 2], "n": None}),
        (['a.b="2"'], {"a": {"b": "2"}, "c": [1, 2], "n": None}),
        (["a.b=[1, {}]"], {"a": {"b": [1, {}]}, "c": [1, 2], "n": None}),
        (["a.b=[1,"], {"a": {"b": "[1,"}, "c": [1, 2], "n": None}),
        (["a.b=1e-5"], {"a": {"b": 1e-5}, "c": [1, 2], "n": None}),
        (["a.b=null"], {"a": {"b": None}, "c": [1, 2], "n": None}),
        (["c.1=9"], {"a": {"b": 1}, "c": [1, 9], "n": None}),
        (["n.x.y=1"], {"a": {"b": 1}, "c": [1, 2], "n": {"x": {"y": 1}}}),
        (["new.x=1"], {"a": {"b": 1}, "c": [1, 2], "n": None, "new": {"x": 1}}),
    ],
)
def test_overrides_set_values(overrides: list[str], expected: object) -> None:
    assert overridden('{"a": {"b": 1}, "c": [1, 2], "n": null}', *overrides) == expected


@pytest.mark.parametrize(
    ("override", "field", "expected"),
    [
        ("a.b", "", "key.path=value"),
        ("=1", "", "key.path=value"),
        ("a..b=1", "", "key.path=value"),
        (".a=1", "", "key.path=value"),
        ("a.=1", "", "key.path=value"),
        ("a b=1", "", "key.path=value"),
        ("--a=1", "--a", ""),
        ("a.b.c=1", "a.b.c", "a path that ends there"),
        ("c.2=1", "c.2", "a number from 0 to 1"),
        ("c.x=1", "c.x", "a number from 0 to 1"),
        ("c.-1=1", "c.-1", "a number from 0 to 1"),
        ("e.0=1", "e.0", "the list is empty"),
    ],
)
def test_overrides_that_lead_nowhere(override: str, field: str, expected: str) -> None:
    text = '{"a": {"b": 1}, "c": [1, 2], "e": []}'
    if not expected:
        assert overridden(text, override) == {**json.loads(text), field: 1}
        return
    with pytest.raises(ConfigError) as caught:
        overridden(text, override)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.source, diagnostic.line, diagnostic.field) == ("command line", None, field)
    assert expected in diagnostic.expected


def test_all_broken_overrides_are_reported_and_good_ones_have_no_line() -> None:
    root = parse_json('{"a": 1}', "a.json")
    assert isinstance(root, MappingNode)
    with pytest.raises(ConfigError) as caught:
        apply_overrides(root, ["x", "a=2", "a.b=1"])
    assert len(caught.value.diagnostics) == 2
    changed = apply_overrides(root, ['b={"c": [1]}'])
    assert value_mark(changed, ("b", "c", 0)) == Mark("command line")
    assert value_mark(changed, ("a",)) == Mark("a.json", 1, 7)
    assert plain(root) == {"a": 1}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text(alphabet='ac.=01[]{}"- \\', max_size=12), max_size=3))
def test_any_overrides_are_applied_or_diagnostics(overrides: list[str]) -> None:
    root = parse_json('{"a": {"a": 1}, "c": [1, [2]]}', "a.json")
    assert isinstance(root, MappingNode)
    try:
        changed = apply_overrides(root, overrides)
    except ConfigError as error:
        num_diagnostics = len(error.diagnostics)
    else:
        assert isinstance(changed, MappingNode)
        return
    assert 1 <= num_diagnostics <= len(overrides)


def test_close_matches_ignore_case_and_keep_the_written_name() -> None:
    assert close_matches("ADAMW", ["sgd", "adam", "adamw"])[0] == "adamw"
    assert close_matches("accuracy", ["Accuracy"]) == ["Accuracy"]
    assert close_matches("zzz", ["Accuracy"]) == []
