"""The list or object that a text spells, and values without the nulls that Arrow adds."""

from __future__ import annotations

import pytest

from loopos.data.record import LONGEST_PYTHON_TEXT, structure_of, without_nulls


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('["a", "b"]', ["a", "b"]),
        (" ['a', None, True, 1.5]\n", ["a", None, True, 1.5]),
        ("{'a': [1, {'b': 'it''s'}]}".replace("''", "\\'"), {"a": [1, {"b": "it's"}]}),
        ('["a", null, true]', ["a", None, True]),
        ("[]", []),
        ("['a' 'b']", None),
        ("['a'\n 'b']", None),
        ("[{'a': 1}\n {'b': 2}]", None),
        ("array(['a'])", None),
        ("[1, 2", None),
        ("[NaN]", None),
        ("[open('x')]", None),
        ("{'a', 'b'}", None),
        ("{1: 'a'}", None),
        ("[(1, 2)]", None),
        ("[b'a']", None),
        ("plain", None),
        ('"text"', None),
        ("", None),
        ("[" * 50_000 + "]" * 50_000, None),
        ("['" + "a" * LONGEST_PYTHON_TEXT + "']", None),
        ("[" + "9" * 5000 + "]", None),
    ],
)
def test_what_a_text_spells(text: str, expected: object) -> None:
    assert structure_of(text) == expected


def test_nulls_go_from_objects_and_stay_in_lists() -> None:
    value = {"a": None, "b": [None, {"c": None, "d": 0}], "e": {"f": None}}
    assert without_nulls(value) == {"b": [None, {"d": 0}], "e": {}}
