"""JSON: positions of keys and values, values equal to those of the standard library, and a table of broken texts."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos.config.diagnostics import ConfigError
from loopos.config.json_text import MOST_LEVELS, MappingNode, Mark, find, key_mark, parse_json, plain, value_mark

# (text, line, column, piece of `actual`, piece of `expected`, piece of the hint)
BROKEN = [
    ("", 1, 1, "the end of the text", "a value", ""),
    ("{", 1, 2, "the end of the text", '"}"', "of line 1 is never closed"),
    ('{"a": 1', 1, 8, "the end of the text", '"}"', "of line 1 is never closed"),
    ('{"a": [1, 2', 1, 12, "the end of the text", '"]"', "never closed"),
    ('{"a":\n', 2, 1, "the end of the text", "a value", ""),
    ('{"a"', 1, 5, "the end of the text", "a colon", ""),
    ('{"a": 1,', 1, 9, "the end of the text", '"}"', "never closed"),
    ('{"a": 1,}', 1, 8, 'a comma before "}"', "no comma after the last entry", "remove the comma"),
    ('{\n  "a": 1,\n}', 2, 9, "a comma before", "no comma", "remove"),
    ('{"a": [1, 2,]}', 1, 12, 'a comma before "]"', "no comma", "remove"),
    ('{"a": [1 2]}', 1, 10, '"2" after a value', 'a comma or "]"', "commas"),
    ('{"a": 1\n "b": 2}', 2, 2, "after a value", 'a comma or "}"', "commas"),
    ('{"a": 1; "b": 2}', 1, 8, '";"', "a comma", ""),
    ('{"a": [1, 2}}', 1, 12, '"}"', 'or "]"', '"[" of line 1 is still open'),
    ('{"a": (1)}', 1, 7, '"("', "a value", ""),
    ('{"a" 1}', 1, 6, 'after the key "a"', "a colon", '"key": value'),
    ('{"a" = 1}', 1, 6, '"="', "a colon", ""),
    ('{"a": }', 1, 7, '"}"', "a value", ""),
    ('{"a": ,}', 1, 7, '","', "a value", ""),
    ("{,}", 1, 2, '","', "a key in double quotes", ""),
    ("{a: 1}", 1, 2, '"a"', "a key in double quotes", '"a"'),
    ("{1: 1}", 1, 2, '"1"', "a key in double quotes", '"1"'),
    ("{'a': 1}", 1, 2, "the quote '", "double quotes", ""),
    ("{\"a\": 'b'}", 1, 7, "the quote '", "double quotes", ""),
    ('{"a": `b`}', 1, 7, "the quote `", "double quotes", ""),
    ('{"a": \u201cb\u201d}', 1, 7, "the quote \u201c", "double quotes", ""),
    ('{"a": b}', 1, 7, "b without quotes", "a value", '"b"'),
    ('{"a": True}', 1, 7, "True", "true", "JSON writes it true"),
    ('{"a": False}', 1, 7, "False", "false", ""),
    ('{"a": None}', 1, 7, "None", "null", ""),
    ('{"a": yes}', 1, 7, "yes", "true", ""),
    ('{"a": NaN}', 1, 7, "NaN", "a finite number", "no NaN"),
    ('{"a": Infinity}', 1, 7, "Infinity", "a finite number", ""),
    ('{"a": -Infinity}', 1, 7, "-Infinity", "a finite number", ""),
    ('{"a": 01}', 1, 7, "01", "a number", "no leading zero"),
    ('{"a": .5}', 1, 7, ".5", "a number", "0.5"),
    ('{"a": 5.}', 1, 7, "5.", "a number", "both sides"),
    ('{"a": +1}', 1, 7, "+1", "a number", "no +"),
    ('{"a": 1e}', 1, 7, "1e", "a number", ""),
    ('{"a": 0x10}', 1, 7, "0x10", "a number", ""),
    ('{"a": 1_000}', 1, 7, "1_000", "a number", "no _"),
    ('{"a": 1,000}', 1, 9, '"000"', "a key in double quotes", ""),
    ('{"a": -}', 1, 7, "-", "a number", ""),
    ('{"a": --1}', 1, 7, "--1", "a number", ""),
    ('{"a": ' + "9" * 5000 + "}", 1, 7, "a number of 5000 digits", "shorter", ""),
    ('{"a": "b}', 1, 7, "text whose quote is never closed", 'a closing "', ""),
    ('{"a": "b\n"}', 1, 7, "past the end of its line", "on the same line", ""),
    ('{"a": "b\tc"}', 1, 9, "a tab inside text", r"\t", ""),
    ('{"a": "b\x01c"}', 1, 9, "the control character 0x01", r"\u0001", ""),
    (r'{"a": "C:\data"}', 1, 10, r"the escape \d", "hexadecimal", r"a backslash is written \\"),
    (r'{"a": "C:\users"}', 1, 10, r"the escape \u", "hexadecimal", r"\\"),
    (r'{"a": "\ud800"}', 1, 7, "half of a character", "whole characters", ""),
    ('{"a": 1} // end', 1, 10, "a comment", "no comments", ".yaml"),
    ('{\n  // first\n  "a": 1}', 2, 3, "a comment", "no comments", ".yaml"),
    ('{"a": /* one */ 1}', 1, 7, "a comment", "no comments", ""),
    ('{"a": 1 # one\n}', 1, 9, "a comment", "no comments", ""),
    ('{"a": 1}}', 1, 9, '"}" after the end', "nothing more", ""),
    ('{"a": 1}\n{"b": 2}', 2, 1, "after the end of the value", "nothing more", ""),
    ('{"a": 1, "b": 2, "a": 3}', 1, 18, 'the key "a" a second time', "each key once", "line 1"),
    ('{"a": {"b": 1,\n "b": 1}}', 2, 2, 'the key "b" a second time', "each key once", "line 1"),
    ("[" * (MOST_LEVELS + 2), 1, MOST_LEVELS + 2, "levels of brackets", "fewer", ""),
    ("\ufeff{}", 1, 1, "", "a value", ""),
    ('{"a":\u00a01}', 1, 6, "", "a value", ""),
    ("{\r\n\t'a': 1}", 2, 2, "the quote '", "double quotes", ""),
]


def test_the_table_has_its_size() -> None:
    assert len({row[0] for row in BROKEN}) == len(BROKEN) == 64


@pytest.mark.parametrize(
    ("text", "line", "column", "actual_piece", "expected", "hint"),
    BROKEN,
    ids=[str(index) for index in range(len(BROKEN))],
)
def test_each_broken_text_has_one_diagnostic_at_its_position(
    text: str, line: int, column: int, actual_piece: str, expected: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json(text, "a.json")
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.source, diagnostic.line, diagnostic.column) == ("a.json", line, column)
    assert actual_piece in diagnostic.actual
    assert expected in diagnostic.expected
    assert hint in diagnostic.hint


def test_every_repeated_key_is_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json('{"a": 1,\n"a": 2,\n"b": {"c": 1,\n"c": 2},\n"a": 3}', "a.json")
    assert [(diagnostic.line, diagnostic.field) for diagnostic in caught.value.diagnostics] == [
        (2, "a"),
        (4, "c"),
        (5, "a"),
    ]


def test_positions_of_keys_and_values() -> None:
    root = parse_json('{\r\n  "é": [1,\n   {"b": null}]\r}', "a.json")
    assert value_mark(root, ()) == Mark("a.json", 1, 1)
    assert key_mark(root, ("é",)) == Mark("a.json", 2, 3)
    assert value_mark(root, ("é",)) == Mark("a.json", 2, 8)
    assert value_mark(root, ("é", 1, "b")) == Mark("a.json", 3, 10)
    assert key_mark(root, ("é", 1, "b")) == Mark("a.json", 3, 5)
    assert value_mark(root, ("é", 1, "missing")) == Mark("a.json", 3, 4)
    assert value_mark(root, ("missing", "too")) == Mark("a.json", 1, 1)
    assert find(root, ("é", 2)) is None
    assert isinstance(find(root, ("é", 1)), MappingNode)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(JSON_VALUES, st.sampled_from([None, 0, 1, "\t"]), st.booleans())
def test_valid_json_has_the_values_of_the_standard_library(
    value: object, indent: int | str | None, ascii: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii)
    read = plain(parse_json(text, "a.json"))
    assert read == json.loads(text)
    assert json.dumps(read) == json.dumps(json.loads(text))  # 1 and 1.0 and true are equal in Python


@pytest.mark.parametrize("text", ["1e999", "-0", "-0.0", "1E+2", "0.1e-1", " [ ] ", "{ }", '"\\ud83d\\ude00"', "1e5"])
def test_forms_of_numbers_and_empty_values(text: str) -> None:
    read, standard = plain(parse_json(text, "a.json")), json.loads(text)
    assert read == standard
    assert type(read) is type(standard)
    if isinstance(read, float) and isinstance(standard, float):
        assert math.copysign(1, read) == math.copysign(1, standard)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="{}[]:,\"\\ \n\t/0123456789eE+-.truefalsn'#a", max_size=40))
def test_any_text_is_read_as_the_standard_library_does_or_is_a_diagnostic(text: str) -> None:
    try:
        read = plain(parse_json(text, "a.json"))
    except ConfigError:
        return
    assert read == json.loads(text)
