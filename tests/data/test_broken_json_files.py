"""Broken JSON and JSON Lines, bad texts and labels: each diagnostic names file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from broken_files import Case, demand_diagnostic

ROW = '{"text": "good", "label": "pos"}\n'


def rows(*labels: object) -> str:
    """JSON Lines with these labels."""
    return "".join(json.dumps({"text": f"text {index}", "label": label}) + "\n" for index, label in enumerate(labels))


def cells(*labels: str) -> str:
    """A CSV with these labels."""
    return "text,label\n" + "".join(f"text {index},{label}\n" for index, label in enumerate(labels))


SYNTAX = [
    Case("missing comma", "a.jsonl", ROW + '{"text": "a" "label": 1}\n', 2, "JSON", "delimiter", 14),
    Case("missing colon", "a.jsonl", ROW + '{"text" "a"}\n', 2, "JSON", "delimiter", 9),
    Case("single quotes", "a.jsonl", "{'text': 'a'}\n", 1, "JSON", "double quotes", 2),
    Case("bare name", "a.jsonl", '{text: "a"}\n', 1, "JSON", "property name", 2),
    Case("cut line", "a.jsonl", ROW + ROW[:20] + "\n" + ROW, 2, "JSON", "cut off", 18),
    Case("cut after colon", "a.jsonl", ROW + '{"text":', 2, "JSON", "the end of the line", 9),
    Case("comma at the end", "a.jsonl", ROW + '{"text": "a", "label": 1},\n', 2, "JSON", "without a comma", 26),
    Case("two on a line", "a.jsonl", '{"text": "a"} {"text": "b"}\n', 1, "JSON", "after the value", 15),
    Case("tab in a string", "a.jsonl", '{"text": "a\tb"}\n', 1, "JSON", r"a tab as \t", 12),
    Case("bad escape", "a.jsonl", r'{"text": "a\x"}', 1, "JSON", "escape", 12),
    Case("bad unicode escape", "a.jsonl", r'{"text": "\u12"}', 1, "JSON", "escape"),
    Case("comment", "a.jsonl", "// rows\n" + ROW, 1, "JSON", "// rows", 1),
    Case("python constant", "a.jsonl", ROW + '{"text": "a", "label": True}\n', 2, "JSON", "True", 24),
    Case("leading zero", "a.jsonl", '{"text": "a", "label": 01}\n', 1, "JSON", "delimiter"),
    Case("deep", "a.jsonl", ROW + "[" * 100_000 + "\n", 2, "JSON", "nested too deeply", 1),
    Case("digits", "a.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}\n", 1, "JSON", "too many digits", 1),
    Case("over two lines", "a.jsonl", '{"text": "a",\n"label": 1}\n', 1, "JSON", "on one line", diagnostics=2),
    Case("with CRLF", "a.jsonl", ROW.replace("\n", "\r\n") + '{"text": \r\n', 2, "JSON", "valid JSON"),
    Case("a string", "a.jsonl", ROW + '"hello"\n', 2, "row", "'hello'"),
    Case("a list", "a.jsonl", ROW + '["good", "pos"]\n', 2, "row", "each value of a row needs a column name"),
    Case("a number", "a.jsonl", ROW + "5\n", 2, "row", "got 5; expected an object"),
    Case("null", "a.ndjson", ROW + "null\n", 2, "row", "got None"),
    Case("name twice", "a.jsonl", ROW + '{"text": "a", "label": 1, "text": "b"}\n', 2, "text", "twice in one object"),
    Case("name twice inside", "a.jsonl", '{"text": "a", "m": {"k": 1, "k": 2}}\n', 1, "k", "distinct names"),
    Case("NaN", "a.jsonl", ROW + '{"text": "a", "label": NaN}\n', 2, "label", "JSON has no NaN"),
    Case("infinity", "a.jsonl", '{"text": "a", "label": -Infinity}\n', 1, "label", "-Infinity"),
    Case("NaN inside", "a.jsonl", '{"text": "a", "more": {"x": [NaN]}}\n', 1, "more", "NaN"),
    Case("empty jsonl", "a.jsonl", "", None, "file", "an empty file"),
    Case("blank jsonl", "a.jsonl", "\n \n", None, "rows", "no rows"),
    Case("bad after blanks", "a.jsonl", "\n\n" + ROW + "\n{\n", 5, "JSON", "valid JSON", 2),
    Case("array cut", "a.json", f"[\n{ROW},\n{ROW}", 4, "JSON", "no closing ]"),
    Case("array syntax", "a.json", f'[\n{ROW},\n{{"text" "b"}}\n]', 4, "JSON", "delimiter", 9),
    Case("array comma missing", "a.json", f"[\n{ROW}{ROW}]", 3, "JSON", "a comma or ] is expected", 1),
    Case("array comma last", "a.json", f"[\n{ROW},\n]", 3, "JSON", "a comma before the closing ]", 1),
    Case("array of strings", "a.json", '[\n"a",\n"b"\n]', 2, "row", "expected an object", diagnostics=2),
    Case("array of lists", "a.json", '[["a", 1]]', 1, "row", "each value of a row needs a column name"),
    Case("array, one null", "a.json", f"[{ROW},\nnull]", 3, "row", "None"),
    Case("array, name twice", "a.json", '[{"text": "a", "label": 1},\n{"text": "b", "text": "c"}]', 2, "text", "twice"),
    Case("array, more behind", "a.json", f"[{ROW}]\nmore", 3, "JSON", "more text after the document", 1),
    Case("empty array", "a.json", "[]", None, "rows", "no rows"),
    Case("empty json", "a.json", "", None, "file", "an empty file"),
    Case("blank json", "a.json", " \n", 1, "file", "blank text"),
    Case("a number as json", "a.json", "\n5", 2, "file", "an array of objects"),
    Case("text as json", "a.json", "hello", 1, "file", "hello"),
    Case("empty object", "a.json", "{}", 1, "data", "no list of rows"),
    Case("other key", "a.json", '{"rows": [{"text": "a", "label": 1}]}', 1, "data", 'rename it to "data"'),
    Case(
        "several objects", "a.json", '{"text": "a",\n "label": 1}\n{"text": "b",\n "label": 2}', 3, "file", "one array"
    ),
    Case("other object", "a.json", '{"rows": [{"text": "a"}]}', 1, "data", "an object with 'rows'"),
    Case("columns", "a.json", '{"text": {"0": "a"}, "label": {"0": 1}}', 1, "data", "put the rows into a list"),
    Case("data no list", "a.json", '{"data": {"text": "a"}}', 1, "data", "an object with 'data'"),
    Case("data empty", "a.json", '{"data": []}', None, "rows", "no rows"),
    Case("data twice", "a.json", f'{{"data": [{ROW}],\n"data": []}}', 3, "data", "twice"),
    Case("data cut", "a.json", f'{{"data": [{ROW}]', 2, "JSON", "no closing }", 2),
    Case("data, no colon", "a.json", '{"data" [1]}', 1, "JSON", "a colon is expected", 9),
    Case("data, bad name", "a.json", "{5: []}", 1, "JSON", "a name in double quotes", 2),
    Case(
        "data, bad element", "a.json", '{"version": 1,\n"data": [\n{"text": "a", "label": 1},\n7]}', 4, "row", "got 7"
    ),
]

TEXTS = [
    Case("empty text", "a.csv", "text,label\n,pos\nbad,neg\n", 2, "text", "''"),
    Case("blank text", "a.csv", "text,label\ngood,pos\n  ,neg\n", 3, "text", "not blank"),
    Case("empty review", "a.csv", "review,stars\n,5\nbad,1\n", 2, "review", "''"),
    Case("null text", "a.jsonl", ROW + '{"text": null, "label": "neg"}\n', 2, "text", "got null"),
    Case("number as text", "a.jsonl", ROW + '{"text": 5, "label": "neg"}\n', 2, "text", "put it into double quotes"),
    Case("list as text", "a.jsonl", ROW + '{"text": ["a"], "label": "neg"}\n', 2, "text", "(a list)"),
    Case("object as text", "a.jsonl", ROW + '{"text": {"a": 1}, "label": "neg"}\n', 2, "text", "(an object)"),
    Case("true as text", "a.jsonl", ROW + '{"text": true, "label": "neg"}\n', 2, "text", "true or false"),
    Case("no text field", "a.jsonl", ROW + '{"label": "neg"}\n', 2, "text", "no such field (fields: 'label')"),
    Case("half a pair", "a.jsonl", ROW + '{"text": "\\ud83d", "label": "neg"}\n', 2, "text", "surrogate"),
    Case("blank pair", "a.csv", "premise,hypothesis,label\na,,0\nb,c,1\n", 2, "hypothesis", "''"),
    Case("null pair", "a.jsonl", '{"text": "a", "text_pair": null, "label": 0}\n', 1, "text_pair", "null"),
    Case("text in an array", "a.json", f'[{ROW},\n{{"text": "",\n"label": 1}}]', 3, "text", "''"),
    Case("two problems", "a.jsonl", ROW + '{"text": "", "label": null}\n', 2, "text", "got null", diagnostics=2),
    Case("text and reader", "a.csv", "text,label\n,pos\nbad\n", 3, "label", ":2: text: got ''", diagnostics=2),
    Case("null label", "a.jsonl", ROW + '{"text": "a", "label": null}\n', 2, "label", "got null"),
    Case("empty label", "a.csv", "text,label\ngood,\nbad,neg\n", 2, "label", "an empty label"),
    Case("blank label", "a.tsv", "text\tlabel\ngood\t \nbad\tneg\n", 2, "label", "an empty label"),
    Case("no label field", "a.jsonl", ROW + '{"text": "a"}\n', 2, "label", "no such field"),
    Case("object as label", "a.jsonl", ROW + '{"text": "a", "label": {"id": 1}}\n', 2, "label", "an object"),
    Case("nested list", "a.jsonl", '{"text": "a", "label": [[1]]}\n', 1, "label", "a list that holds [1]"),
    Case("list of objects", "a.jsonl", '{"text": "a", "label": [{"id": 1}]}\n', 1, "label", "a list that holds"),
    Case("list of null", "a.jsonl", '{"text": "a", "label": ["x", null]}\n', 1, "label", "holds None"),
    Case("list of floats", "a.jsonl", '{"text": "a", "label": [0.5]}\n', 1, "label", "list the names or numbers"),
    Case("list of booleans", "a.jsonl", '{"text": "a", "label": [true]}\n', 1, "label", "holds True"),
    Case("overflowing label", "a.jsonl", '{"text": "a", "label": 1e999}\n', 1, "label", "inf"),
    Case("half a pair as label", "a.jsonl", '{"text": "a", "label": "\\udc00"}\n', 1, "label", "surrogate"),
]

LABELS = [
    Case("beyond num_classes", "a.jsonl", rows(0, 1, 2), 3, "label", "one of the 2 classes 0, 1", num_classes=2),
    Case("counted from 1", "a.csv", cells("1", "2", "3"), 4, "label", "counted from 0 to 2", num_classes=3),
    Case("negative", "a.jsonl", rows(1, -1), 2, "label", "got -1", num_classes=2),
    Case("far beyond", "a.csv", cells("0", "1", "99", "-5"), 4, "label", "10 classes", num_classes=10, diagnostics=2),
    Case("three strings for two", "a.csv", cells("b", "a", "b", "x"), None, "model.num_classes", "'b': 2",
         num_classes=2),
    Case("two strings for three", "a.csv", cells("a", "b"), None, "model.num_classes", "to 2", num_classes=3),
    Case("unknown name", "a.csv", cells("pos", "neg", "postive"), 4, "label", "'pos'", class_names=("neg", "pos")),
    Case("near name", "a.csv", cells("refund", "order", "refnd"), 4, "label", "did you mean 'refund'?",
         class_names=("order", "refund")),
    Case("case differs", "a.csv", cells("Pos", "neg"), 2, "label", "classes neg, Pos2", class_names=("neg", "Pos2")),
    Case("names and number", "a.csv", cells("a", "b"), None, "model.num_classes", "3 and 2 names", num_classes=3,
         class_names=("a", "b")),
    Case("names too few", "a.jsonl", rows(0, 1, 2), 3, "label", "2 classes", class_names=("no", "yes")),
    Case("text and number", "a.jsonl", rows("pos", 1), 1, "label", "(the first whole number)", diagnostics=2),
    Case("number and text", "a.jsonl", rows(0, 1, 1, "one"), 1, "label", ":4: label: got 'one'", diagnostics=2),
    Case("true and 1", "a.jsonl", rows(True, 1), 1, "label", "(the first true or false)", diagnostics=2),
    Case("list and text", "a.jsonl", rows(["a"], "a"), 1, "label", "(the first list)", diagnostics=2),
    Case("list and number", "a.jsonl", rows(3, [3]), 1, "label", "labels of one kind", diagnostics=2),
    Case("four kinds", "a.jsonl", rows("a", 1, True, [1]), 1, "label", "(the first list)", diagnostics=4),
    Case("mixed members", "a.jsonl", rows(["a"], [1]), 1, "label", "(the first text)", diagnostics=2),
    Case("one class", "a.csv", cells("pos", "pos"), None, "label", "every row labeled pos"),
    Case("one number", "a.jsonl", rows(0, 0, 0), None, "label", "every row labeled 0"),
    Case("one of ten", "a.jsonl", rows(4, 4), None, "label", "at least 2 classes", num_classes=10),
    Case("one value", "a.jsonl", rows(2.5, 2.5), None, "label", "the value 2.5 in every row"),
    Case("only true", "a.jsonl", rows(True, True), None, "label", "every row labeled true"),
    Case("no members", "a.jsonl", rows([], []), None, "label", "no row with a class"),
    Case("listed twice", "a.jsonl", rows(["a", "b"], ["a", "a"]), 2, "label", "each class once"),
    Case("zeros and ones", "a.jsonl", rows([0, 1, 0], [1, 0, 0]), 1, "label", "in turn is not read", diagnostics=2),
    Case("member beyond", "a.jsonl", rows([0, 1], [2]), 2, "label", "2 classes", num_classes=2),
    Case("unknown member", "a.jsonl", rows(["a"], ["b"], ["c"]), 3, "label", "classes a, b", class_names=("a", "b")),
    Case("word in regression", "a.csv", cells("1.5", "2", "n/a"), 4, "label", "task: regression", task="regression"),
    Case("true in regression", "a.jsonl", rows(1, True), 2, "label", "expected a number", task="regression"),
    Case("list in regression", "a.jsonl", rows(1.5, [2]), 2, "label", "expected a number", task="regression"),
    Case("fraction, ten classes", "a.jsonl", rows(1, 2.5, 3), 2, "label", "leave model.num_classes", num_classes=10),
    Case("fraction, names", "a.csv", cells("1", "2.5"), 3, "label", "leave model.labels", class_names=("a", "b")),
    Case("fraction as class", "a.jsonl", rows(1, 2.5), 2, "label", "not a fraction", task="classification"),
    Case("list as class", "a.jsonl", rows(["a", "b"], ["b"]), 1, "label", "multi_label", task="classification"),
    Case("number as list", "a.jsonl", rows(3, 4), 1, "label", "a|b in CSV", task="multi_label", diagnostics=2),
    Case("25 numbers as lists", "a.jsonl", rows(*range(25)), 1, "label", "and 5 more", task="multi_label", diagnostics=20),
]  # fmt: skip

COLUMNS = [
    Case("no text", "a.csv", "foo,label\na,b\n", None, "data.columns.text", "Columns: 'foo'"),
    Case("no label", "a.csv", "text,foo\na,b\n", None, "data.columns.label", "Columns: 'text', 'foo'"),
    Case("two texts", "a.csv", "sentence,review,label\na,b,c\n", None, "data.columns.text", "sentence, review"),
    Case("two labels", "a.csv", "text,intent,emotion\na,b,c\n", None, "data.columns.label", "intent, emotion"),
    Case("label and labels", "a.csv", "text,label,labels\na,b,c\n", None, "data.columns.label", "label, labels"),
    Case("two cases", "a.csv", "Text,text,label\na,b,c\n", None, "data.columns.text", "Text, text"),
    Case("two pairs", "a.csv", "question,answer,passage,label\na,b,c,d\n", None, "data.columns.text", "with"),
    Case("unknown role", "a.csv", cells("a", "b"), None, "data.columns.txt", "mean text?",
         columns={"txt": "text"}),
    Case("unknown column", "a.csv", cells("a", "b"), None, "data.columns.label", '"label"?',
         columns={"label": "lable"}),
    Case("one for two", "a.csv", cells("a", "b"), None, "data.columns.label", "also has the role text",
         columns={"text": "label", "label": "label"}),
]  # fmt: skip

CASES = [*SYNTAX, *TEXTS, *LABELS, *COLUMNS]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_broken_file_ends_in_a_diagnostic_with_its_position(case: Case, tmp_path: Path) -> None:
    demand_diagnostic(case, tmp_path)


def test_the_cases_differ() -> None:
    distinct = {
        (case.file, case.content, str(case.columns), case.task, case.num_classes, case.class_names) for case in CASES
    }
    assert len(distinct) == len(CASES) >= 120
