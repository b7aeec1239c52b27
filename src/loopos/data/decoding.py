"""Bytes that are not UTF-8 → the encoding that they may be in, for a hint.

Enters: the line with the first byte that does not fit. Leaves: a name for `data.encoding`, or nothing. A guess is never
used to read: a wrong one trains on garbled text. Each candidate decodes the line; the one whose characters beyond ASCII
are most often those that its languages write wins, the earlier one where two are equal.

A file → its bytes in chunks, unpacked where its name says .gz or .zst.

Enters: the path of a regular file, how far it may expand. Leaves: chunks of bytes. A small file that unpacks to
gigabytes is refused before the memory is taken: beyond `FREE_BYTES` the output may be at most `max_expansion` times the
size of the file. Left out: what the bytes mean (`decoding`).

Bytes of a file → numbered lines of text.

Enters: the path of a text file, plain or compressed (.gz, .zst), and the `TextRules`. Leaves: its lines, 1-based,
decoded from UTF-8 (with or without a byte order mark), from UTF-16 with one, or from the encoding that the user names.
Lines end at the line feed alone: a carriage return before it stays on the line, so that a quoted CSV cell keeps it;
readers strip it at the end of a record. In a file without any line feed carriage returns end the lines.
Left out: reading in a guessed encoding. A wrong guess trains on garbled text, so other encodings are faults with the
byte's place, which name the likely one (`encodings`).
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import os
import re
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from loopos.config.diagnostics import DataError, MissingRequirement, Remedy
from loopos.config.sections import MAX_EXPANSION, MAX_LINE_BYTES
from loopos.config.source import special_file
from loopos.data.record import file_error

_LATIN = "À-ÖØ-öø-ÿŒœŠšŽžŸ€‘’“”„–—…•™«»°§£©®¡¿ªº·´¨×±²³½¼¾µ\u00a0"
_CANDIDATES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("cp1252", re.compile(f"[{_LATIN}]")),
    ("mac_roman", re.compile(f"[{_LATIN}]")),
    ("cp1250", re.compile(f"[{_LATIN}ĄąĆćĘęŁłŃńŚśŹźŻżČčĎďĚěŇňŘřŤťŮůŐőŰűĂăŞşŢţ]")),
    ("cp1251", re.compile("[А-яЁёІіЇїЄєҐґ№«»–—…“”„’\u00a0]")),
    ("koi8_r", re.compile("[А-яЁё]")),
    ("shift_jis", re.compile("[ぁ-んァ-ヶー一-龠々、。「」・！？（）]")),
    ("euc_kr", re.compile("[가-힣]")),
    ("gb18030", re.compile("[一-龠，。！？、：；（）“”《》…—]")),
    ("big5", re.compile("[一-龠，。！？、：；（）「」]")),
)
_CYRILLIC = ("cp1251", "koi8_r")
_WESTERN = ("cp1252", "mac_roman", "cp1250")
_SAMPLE_BYTES = 1 << 16


def guessed_encoding(raw: bytes) -> str | None:
    """The encoding that `raw`, which is not UTF-8, is most likely in; None where none fits."""
    best, most = None, 0.0
    sample = raw[:_SAMPLE_BYTES]
    for name, expected in _CANDIDATES:
        try:
            text = sample.decode(name)
        except UnicodeDecodeError:
            continue
        beyond = [place for place, character in enumerate(text) if character > "\x7f"]
        score = sum(expected.match(text[place]) is not None for place in beyond) / max(1, len(beyond))
        if name in _WESTERN:
            score -= _runs(text, beyond) + _signs_in_words(text, beyond)
        if name in _CYRILLIC:
            # Each reads the other's small letters as capitals.
            score -= 0.5 * sum(text[place].isupper() for place in beyond) / max(1, len(beyond))
        if score > most + 1e-9:
            best, most = name, score
    return best if most >= 0.5 else None


def _signs_in_words(text: str, beyond: list[int]) -> float:
    """The share of characters beyond ASCII that are signs, such as ³, between two letters."""
    beside = {place: text[place - 1 : place] + text[place + 1 : place + 2] for place in beyond}
    in_words = [place for place in beyond if len(beside[place]) == 2 and beside[place].isalpha()]
    signs = [place for place in in_words if not text[place].isalpha() and text[place] not in "’–"]
    return len(signs) / max(1, len(beyond))


def _runs(text: str, beyond: list[int]) -> float:
    """The share of letters beyond ASCII with another one on both sides: high for any alphabet that is not Latin."""
    letters = {place for place in beyond if text[place].isalpha()}
    return sum(place - 1 in letters and place + 1 in letters for place in letters) / max(1, len(beyond))


CHUNK_BYTES = 1 << 20
FREE_BYTES = 64 << 20
"""Unpacked bytes that are always read, whatever the file's own size: small files of repeated rows shrink a lot."""
# A block of zstd is 4 bytes at the least and 128 KiB unpacked: so many bytes of input give at most 128 MiB at once.
_ZSTD_INPUT_BYTES = 4096


def compression(path: str) -> str:
    """The compression that a file's name states: "gz", "zst" or "" for none."""
    suffix = Path(path).suffix.lower()
    return suffix[1:] if suffix in (".gz", ".zst") else ""


def require_regular(path: str) -> None:
    """Raises `DataError` for a pipe, a socket or a device: to open one may wait for ever."""
    kind = special_file(path)
    if kind:
        raise file_error(path, kind, "a regular file", "write the data into a file first, and give its path")


def chunks_of(path: str, max_expansion: int) -> Iterator[bytes]:
    """Yields the bytes of a file, unpacked.

    Raises:
        DataError: a pipe, socket or device; a file that may not or cannot be read; broken compression; one that
            unpacks to more than `max_expansion` times its size.
        EnvironmentFault: a .zst file without the `zstandard` package.
    """
    require_regular(path)
    kind = compression(path)
    reader = {"gz": _gzip_chunks, "zst": _zstd_chunks}.get(kind, _plain_chunks)
    try:
        most = max(FREE_BYTES, max_expansion * os.path.getsize(path)) if kind else None
        unpacked = 0
        for chunk in reader(path):
            unpacked += len(chunk)
            if most is not None and unpacked > most:
                raise _expands_too_far(path, max_expansion)
            yield chunk
    except PermissionError as error:
        raise file_error(path, "a file that may not be read", "a readable file", "check its permissions") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _broken_compression(path, "gzip", str(error)) from error
    except OSError as error:
        raise file_error(path, f"a file that cannot be read ({error.strerror or error})", "a readable file") from error


def check_expansion(path: str, unpacked: int, max_expansion: int) -> None:
    """Raises `DataError` where a packed file states that it unpacks to too many bytes (a spreadsheet is one)."""
    if unpacked > max(FREE_BYTES, max_expansion * os.path.getsize(path)):
        raise _expands_too_far(path, max_expansion)


def _plain_chunks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _gzip_chunks(path: str) -> Iterator[bytes]:
    with gzip.open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(path: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise MissingRequirement(
            f"{path}: reading .zst files needs the package zstandard: pip install zstandard"
        ) from error
    decompressor, begun = zstandard.ZstdDecompressor().decompressobj(), False
    try:
        for whole in _plain_chunks(path):
            for start in range(0, len(whole), _ZSTD_INPUT_BYTES):
                chunk = whole[start : start + _ZSTD_INPUT_BYTES]
                while chunk:
                    begun = True
                    data = decompressor.decompress(chunk)
                    if data:
                        yield data
                    chunk = b""
                    if decompressor.eof:
                        chunk, begun = decompressor.unused_data, False
                        decompressor = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise _broken_compression(path, "zstd", str(error)) from error
    if begun:
        raise _broken_compression(path, "zstd", "the data ends in the middle of a frame")


def _broken_compression(path: str, kind: str, reason: str) -> DataError:
    return file_error(
        path,
        f"broken {kind} data ({reason})",
        f"a whole {kind} file",
        "the file is cut off, damaged, or not compressed at all: copy or download it again, or correct its suffix",
        field="compression",
    )


def _expands_too_far(path: str, max_expansion: int) -> DataError:
    size = os.path.getsize(path)
    return file_error(
        path,
        f"{size:,} bytes that unpack to more than {max(FREE_BYTES, max_expansion * size):,}",
        f"at most {max_expansion} times as many (data.max_expansion)",
        "raise data.max_expansion if the file is what it should be, or unpack it first",
        field="compression",
    )


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
_TEXT_EXPECTED = "UTF-8 text (or UTF-16 with a byte order mark)"


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
            position = offset + error.start
            actual = f"byte 0x{raw[error.start]:02x} at byte offset {position}, which is not {_written(encoding)}"
            column = len(raw[: error.start].decode(encoding, errors="replace")) + 1
            expected = _TEXT_EXPECTED if encoding == "utf-8" else f"{_written(encoding)} text"
            hint, remedy = _encoding_advice(raw, encoding)
            raise file_error(
                path, actual, expected, hint, line=number, column=column, field="encoding", remedy=remedy
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
            _TEXT_EXPECTED,
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
                f"{_TEXT_EXPECTED}, as the file's name says",
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
                _TEXT_EXPECTED,
                "save the file again as UTF-8",
                line=1,
                field="encoding",
                remedy=Remedy("or name its encoding", ((_ENCODING, f"utf-16-{'be' if even > odd else 'le'}"),)),
            )
