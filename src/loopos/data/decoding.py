"""Bytes of a file → numbered lines of text.

Enters: the path of a text file, plain or compressed (.gz, .zst), and the `TextRules`. Leaves: its lines, 1-based,
decoded from UTF-8 (with or without a byte order mark), from UTF-16 with one, or from the encoding that the user names.
Lines end at the line feed alone: a carriage return before it stays on the line, so that a quoted CSV cell keeps it;
readers strip it at the end of a record. In a file without any line feed carriage returns end the lines.
Left out: reading in a guessed encoding. A wrong guess trains on garbled text, so other encodings are faults with the
byte's place, which name the likely one (`encodings`).
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from loopos.config.faults import DataError, Remedy
from loopos.config.sections import MAX_EXPANSION, MAX_LINE_BYTES
from loopos.data.encodings import guessed_encoding
from loopos.data.record import file_error
from loopos.data.unpacking import chunks_of

_SIGNATURES = (
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"PK\x03\x04", "a zip archive (a spreadsheet such as .xlsx is one)"),
    (b"PAR1", "a parquet file"),
    (b"ARROW1", "an arrow file"),
    (b"%PDF", "a PDF document"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word document"),
    (b"\xff\xfe\x00\x00", "UTF-32 text"),
    (b"\x00\x00\xfe\xff", "UTF-32 text"),
)
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ENCODING = "data.encoding"
_TEXT_WANTED = "UTF-8 text (or UTF-16 with a byte order mark)"


@dataclass(frozen=True, slots=True)
class TextRules:
    """How text files are read. `encoding`: None for UTF-8, and UTF-16 with a byte order mark; a mark wins over it.
    `max_line_bytes`: longest line of a file of rows; `max_expansion`: unpacked bytes for each byte of a .gz or .zst.
    """

    encoding: str | None = None
    max_line_bytes: int = MAX_LINE_BYTES
    max_expansion: int = MAX_EXPANSION


PLAIN_RULES = TextRules()


def read_lines(path: str, rules: TextRules = PLAIN_RULES) -> Generator[tuple[int, str], None, None]:
    """Yields `(number, line)` of a text file, numbers from 1, without the line feed.

    Raises:
        DataError: no regular file, empty file, not text, another encoding (byte offset and line), a line over the
            limit, broken compression or such that unpacks to too much.
        EnvironmentFault: a .zst file without the `zstandard` package.
    """
    yield from _lines(path, rules, rules.max_line_bytes)


def read_text(path: str, rules: TextRules = PLAIN_RULES) -> str:
    """The whole text of a file; as `read_lines`, with every line feed kept (a JSON document needs it in one piece, and
    a corpus may be one line), whatever the length of its lines.
    """
    return "\n".join(line for _, line in _lines(path, rules, None))


def split_lines(text: str) -> list[str]:
    """The lines of a text by the same rule: ended by line feeds, or in a text without any by carriage returns."""
    lines = text.split("\n" if "\n" in text else "\r")
    return lines if lines[-1] else lines[:-1]


def _lines(path: str, rules: TextRules, limit: int | None) -> Generator[tuple[int, str], None, None]:
    chunks = chunks_of(path, rules.max_expansion)
    head = next(chunks, b"")
    if not head:
        raise file_error(path, "an empty file", "rows of data", "check the path, or how the file was made")
    if head.startswith(_UTF16_MARKS) and not head.startswith(b"\xff\xfe\x00\x00"):
        yield from _wide_lines(path, b"".join([head, *chunks]), "utf-16", limit)
        return
    _check_signature(path, head, rules.encoding)
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    encoding = "utf-8" if start or rules.encoding is None else codecs.lookup(rules.encoding).name
    if "a\n".encode(encoding) != b"a\n":
        yield from _wide_lines(path, b"".join([head, *chunks]), encoding, limit)
        return
    yield from _narrow_lines(path, itertools.chain([head[start:]], chunks), encoding, start, limit)


def _narrow_lines(
    path: str, chunks: Iterator[bytes], encoding: str, offset: int, limit: int | None
) -> Iterator[tuple[int, str]]:
    """Lines of an encoding in which a line feed is one byte."""
    for number, raw in enumerate(_byte_lines(path, chunks, limit), start=1):
        try:
            line = raw.decode(encoding)
        except UnicodeDecodeError as error:
            place = offset + error.start
            given = f"byte 0x{raw[error.start]:02x} at byte offset {place}, which is not {_written(encoding)}"
            column = len(raw[: error.start].decode(encoding, errors="replace")) + 1
            wanted = _TEXT_WANTED if encoding == "utf-8" else f"{_written(encoding)} text"
            hint, remedy = _encoding_advice(raw, encoding)
            raise file_error(
                path, given, wanted, hint, line=number, column=column, field="encoding", remedy=remedy
            ) from error
        yield number, line
        offset += len(raw) + 1


def _written(encoding: str) -> str:
    return "UTF-8" if encoding == "utf-8" else encoding


def _encoding_advice(raw: bytes, encoding: str) -> tuple[str, Remedy]:
    guess = guessed_encoding(raw)
    if guess is None or guess == encoding:
        return "save the file as UTF-8", Remedy("or name its encoding", ((_ENCODING, "NAME"),))
    hint = f"this looks like {guess}: save the file as UTF-8"
    return hint, Remedy("or read it so and look at the rows", ((_ENCODING, guess),))


def _wide_lines(path: str, data: bytes, encoding: str, limit: int | None) -> Iterator[tuple[int, str]]:
    """Lines of an encoding in which a line feed is more than one byte, or another one: the text is decoded whole."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        readable = data[: error.start].decode(encoding, errors="ignore")
        why = ", as the byte order mark says" if encoding == "utf-16" else ""
        raise file_error(
            path,
            f"bytes at byte offset {error.start} that are not {encoding.upper()}{why}",
            _TEXT_WANTED,
            "save the file again as UTF-8",
            line=readable.count("\n") + 1,
            field="encoding",
        ) from error
    for number, line in enumerate(split_lines(text.removeprefix("\ufeff")), start=1):
        if limit is not None and len(line) > limit:
            raise _too_long(path, number, limit)
        yield number, line


def _byte_lines(path: str, chunks: Iterator[bytes], limit: int | None) -> Iterator[bytes]:
    """Lines without their ends. What ends them is known at the first line feed, or at the end of the file, or where so
    much came without one that a line would be over the limit.
    """
    pending: list[bytes] = []
    size, number = 0, 0
    ended_by: bytes | None = None
    for chunk in chunks:
        if ended_by is None and b"\n" in chunk:
            ended_by = b"\n"
        pending.append(chunk)
        size += len(chunk)
        if ended_by is None and limit is not None and size > limit:
            ended_by = b"\r" if b"\r" in b"".join(pending)[:-1] else b"\n"
            pending = [b"".join(pending)]
        if ended_by is not None and ended_by in pending[-1]:
            *whole, rest = b"".join(pending).split(ended_by)
            pending, size = [rest], len(rest)
            for line in whole:
                number += 1
                if limit is not None and len(line) > limit:
                    raise _too_long(path, number, limit)
                yield line
        if limit is not None and size > limit:
            raise _too_long(path, number + 1, limit)
    rest = b"".join(pending)
    if ended_by is None and b"\r" in rest:
        *whole, rest = rest.split(b"\r")
        yield from whole
    if rest:
        yield rest


def _too_long(path: str, number: int, limit: int) -> DataError:
    return file_error(
        path,
        f"a line of more than {limit:,} bytes",
        "one row a line",
        "is this a file of rows? If it is, raise data.max_line_bytes",
        line=number,
        field="line",
    )


def _check_signature(path: str, head: bytes, encoding: str | None) -> None:
    for signature, name in _SIGNATURES:
        if head.startswith(signature) and not (encoding is not None and name.startswith("UTF-32")):
            raise file_error(
                path,
                name,
                f"{_TEXT_WANTED}, as the file's name says",
                "name the file after its content (.csv.gz, .jsonl.zst, .parquet, .arrow), or export it as CSV or JSON",
                line=1,
                field="encoding",
            )
    sample = head[:400]
    if encoding is None and len(sample) >= 8 and 0 in sample:
        even, odd = sample[0::2].count(0) * 2, sample[1::2].count(0) * 2
        if max(even, odd) > 0.8 * len(sample) and min(even, odd) < 0.2 * len(sample):
            raise file_error(
                path,
                "what looks like UTF-16 without a byte order mark",
                _TEXT_WANTED,
                "save the file again as UTF-8",
                line=1,
                field="encoding",
                remedy=Remedy("or name its encoding", ((_ENCODING, f"utf-16-{'be' if even > odd else 'le'}"),)),
            )
