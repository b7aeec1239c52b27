"""Line ends, encodings, and the bounds that keep one file from taking the whole machine."""

from __future__ import annotations

import gzip
import json
import os
import socket
import time
from pathlib import Path

import pytest
import zstandard

from loopos.config.diagnostics import ConfigError, DataError
from loopos.config.source import read_source
from loopos.data.decoding import PLAIN_RULES, TextRules, guessed_encoding, read_lines, read_text
from loopos.data.rows import read

MIB = 1 << 20


def _rows(path: Path, rules: TextRules = PLAIN_RULES) -> list[tuple[int | None, dict[str, object]]]:
    return [(row.line, row.values) for row in read(str(path), rules=rules)]


def _refused(path: Path, rules: TextRules = PLAIN_RULES) -> str:
    with pytest.raises(DataError) as caught:
        _rows(path, rules)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


TWO = [(2, {"text": "film 0", "label": "neg"}), (3, {"text": "film 1", "label": "pos"})]
AS_LINES = {
    "m.csv": (["text,label", "film 0,neg", "film 1,pos"], TWO),
    "m.tsv": (["text\tlabel", "film 0\tneg", "film 1\tpos"], TWO),
    "m.txt": (["text,label", "film 0,neg", "film 1,pos"], TWO),
    "m.jsonl": (
        ['{"text": "film 0", "label": "neg"}', '{"text": "film 1", "label": "pos"}'],
        [(1, TWO[0][1]), (2, TWO[1][1])],
    ),
    "m.json": (
        ['[{"text": "film 0", "label": "neg"},', '{"text": "film 1", "label": "pos"}]'],
        [(1, TWO[0][1]), (2, TWO[1][1])],
    ),
    "worked.txt": (
        ["Problem: 1 + 1?", "Answer: 2", "Problem: 2 + 2?", "Answer: 4"],
        [
            (1, {"problem": "1 + 1?", "reasoning": [], "answer": "2"}),
            (3, {"problem": "2 + 2?", "reasoning": [], "answer": "4"}),
        ],
    ),
    "pairs.txt": (["Prompt: a", "Chosen: b", "Rejected: c"], [(1, {"prompt": "a", "chosen": "b", "rejected": "c"})]),
}


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"], ids=["CR", "LF", "CRLF"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("name", AS_LINES)
def test_lines_end_in_cr_where_there_is_no_lf(name: str, encoding: str, end: str, tmp_path: Path) -> None:
    lines, expected = AS_LINES[name]
    for text in (end.join(lines), end.join(lines) + end):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert _rows(tmp_path / name) == expected


def test_a_cr_inside_a_cell_of_a_file_with_lf_stays(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,label\n"one\rtwo",pos\n')
    assert _rows(tmp_path / "a.csv") == [(2, {"text": "one\rtwo", "label": "pos"})]


def test_mixed_line_ends_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\rfilm 0,neg\rfilm 1,pos\n")
    assert "line ends of one kind: LF, CRLF or CR" in _refused(tmp_path / "a.csv")


def test_cr_lines_are_found_behind_the_bound_of_a_line(tmp_path: Path) -> None:
    """A file of CR lines is longer than one line may be: what ends lines is known before its end."""
    count = 3 * MIB // 100
    (tmp_path / "a.txt").write_bytes(b"\r".join([b"x" * 99] * count))
    lines = list(read_lines(str(tmp_path / "a.txt"), TextRules(max_line_bytes=MIB)))
    assert len(lines) == count
    assert lines[-1] == (count, "x" * 99)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "le café est très bon, 5 €, “vraiment”"),
        ("cp1251", "доставка пришла поздно, коробка открыта"),
        ("cp1252", "Die Größe paßt nicht, bitte ändern: Straße 5"),
        ("koi8_r", "доставка пришла поздно, коробка открыта"),
        ("cp1250", "paczka przyszła późno, pudełko było otwarte"),
        ("shift_jis", "荷物が遅れて届きました。箱が開いていた"),
        ("gb18030", "包裹来晚了，盒子是开的。"),
        ("euc_kr", "소포가 늦게 도착했고 상자가 열려 있었다"),
        ("mac_roman", "le café est très bon, “vraiment”"),
    ],
)
def test_the_encoding_is_a_key_and_the_error_guesses_it(encoding: str, text: str, tmp_path: Path) -> None:
    as_csv, as_json = f'text,label\n"{text}",pos\n', f'{{"text": "{text}", "label": "pos"}}\n'
    for name, content in (("a.csv", as_csv), ("a.jsonl", as_json)):
        (tmp_path / name).write_bytes(content.encode(encoding))
        assert _rows(tmp_path / name, TextRules(encoding=encoding))[0][1] == {"text": text, "label": "pos"}
        refused = _refused(tmp_path / name)
        assert (
            f'this looks like {encoding}: save the file as UTF-8 or read it in that encoding and check the rows: data.encoding: "{encoding}"'
            in refused
        )


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_without_a_mark_are_read_by_name(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\nnaïve,neg\n".encode(encoding))
    assert _rows(tmp_path / "a.csv", TextRules(encoding=encoding)) == [(2, {"text": "naïve", "label": "neg"})]


def test_a_byte_order_mark_wins_over_the_key(tmp_path: Path) -> None:
    for mark in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.csv").write_bytes("text,label\nnaïve,neg\n".encode(mark))
        assert _rows(tmp_path / "a.csv", TextRules(encoding="cp1252")) == [(2, {"text": "naïve", "label": "neg"})]


def test_a_byte_that_the_named_encoding_lacks_has_a_position(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\ngood,pos\nab\x81c,neg\n")
    refused = _refused(tmp_path / "a.csv", TextRules(encoding="cp1252"))
    assert "a.csv:3:3: encoding: got byte 0x81 at byte offset 22, which is not cp1252" in refused


def test_pure_ascii_is_not_guessed() -> None:
    assert guessed_encoding(b"\x81\x8d\x8f\x90\x9d") is None


def test_a_line_over_the_bound_is_one_sentence(tmp_path: Path) -> None:
    rules = TextRules(max_line_bytes=MIB)
    good = json.dumps({"text": "a", "label": 1}) + "\n"
    for text, line in ((good * 3 + json.dumps({"text": "x" * MIB, "label": 1}) + "\n" + good, 4), ("x" * (2 * MIB), 1)):
        (tmp_path / "a.jsonl").write_text(text)
        refused = _refused(tmp_path / "a.jsonl", rules)
        assert f"a.jsonl:{line}: line: got a line of more than 1,048,576 bytes" in refused
        assert "data.max_line_bytes" in refused
    (tmp_path / "a.jsonl").write_text(good + json.dumps({"text": "x" * (MIB - 30), "label": 1}) + "\n")
    assert [line for line, _ in _rows(tmp_path / "a.jsonl", rules)] == [1, 2]


def test_the_bound_of_a_line_does_not_apply_to_documents_and_corpora(tmp_path: Path) -> None:
    """A .json array and a corpus such as text8 are one line of any length."""
    rules = TextRules(max_line_bytes=100)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 50, "label": 1}] * 9))
    assert len(_rows(tmp_path / "a.json", rules)) == 9
    (tmp_path / "b.txt").write_text("word " * 99)
    assert len(read_text(str(tmp_path / "b.txt"), rules)) == 495


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_file_that_expands_too_far_is_refused_before_it_is_whole(kind: str, tmp_path: Path) -> None:
    """96 MiB of one letter in a file of some kilobytes; small files of repeated rows pass."""
    path = tmp_path / f"a.jsonl.{kind}"
    pack = gzip.compress if kind == "gz" else zstandard.compress
    path.write_bytes(pack(b'{"text": "good", "label": 1}\n' * 5000))
    assert len(_rows(path)) == 5000
    path.write_bytes(pack((b'{"text": "' + b"x" * MIB + b'", "label": 1}\n') * 96))
    refused = _refused(path)
    assert f"bytes that unpack to more than {64 * MIB:,}; expected at most 200 times as many" in refused
    assert "data.max_expansion" in refused


def test_zstd_frames_that_follow_each_other_are_read(tmp_path: Path) -> None:
    line = b'{"text": "good", "label": 1}\n'
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line) + zstandard.compress(line * 2))
    assert len(_rows(tmp_path / "a.jsonl.zst")) == 3


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a pipe that nobody writes to would wait for ever: a test that hangs has failed."""
    monkeypatch.chdir(tmp_path)
    named = {"fifo": "a named pipe", "socket": "a socket", "device": "a device"}[kind]
    with socket.socket(socket.AF_UNIX) as listening:
        for name in ("a.jsonl", "a.parquet", "a.arrow", "a.xlsx", "c.json"):
            if kind == "fifo":
                os.mkfifo(name)
            elif kind == "device":
                os.symlink("/dev/zero", name)
            elif not os.path.exists("the-socket"):
                listening.bind("the-socket")
            if kind == "socket":
                os.symlink("the-socket", name)
            if name != "c.json":
                assert f"{name}: file: got {named}; expected a regular file" in _refused(Path(name))
        with pytest.raises(ConfigError, match=f"got {named}; expected a config file"):
            read_source("c.json")
        with pytest.raises(DataError, match=f"got {named}"):
            next(read_lines("a.jsonl"))


def test_many_columns_take_seconds_and_not_hours(tmp_path: Path) -> None:
    """100,000 columns; the quadratic search took minutes, which the test's own time would show."""
    names = [f"c{number}" for number in range(100_000)]
    (tmp_path / "a.csv").write_text(",".join(names) + "\n" + ",".join(["1"] * len(names)) + "\n")
    began = time.process_time()
    assert len(_rows(tmp_path / "a.csv")[0][1]) == 100_000
    (tmp_path / "b.csv").write_text(",".join([*names, "c99999"]) + "\n1\n")
    assert "'c99999' twice (columns 100000 and 100001)" in _refused(tmp_path / "b.csv")
    (tmp_path / "c.jsonl").write_text("{" + ", ".join(f'"{name}": 1' for name in [*names, "c99999"]) + "}\n")
    assert "the name 'c99999' twice" in _refused(tmp_path / "c.jsonl")
    assert time.process_time() - began < 20


def test_blank_stretches_take_no_time(tmp_path: Path) -> None:
    """A second line of 200,000 blanks: a pattern that goes back from every one of them would take minutes."""
    (tmp_path / "a.json").write_text(
        '{"text": "a", "label": 1}\n' + " " * 200_000 + "\n" + '{"text": "b", "label": 0}\n'
    )
    assert [line for line, _ in _rows(tmp_path / "a.json")] == [1, 3]
