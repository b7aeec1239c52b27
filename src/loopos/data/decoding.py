"""Read text files: bytes (plain, .gz, .zst) → numbered lines of text, with bounds and precise errors.

Text is UTF-8 (with or without BOM), UTF-16 with BOM, or the encoding that the user names. Any other encoding is an
error that suggests a likely one: reading with a guess could train on garbled text. Only line feeds end lines (carriage
returns if a file has no line feed), so that quoted CSV cells keep their carriage returns. A file that unpacks to far
more than its size is refused before the memory is used.
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
    """The most likely encoding of `raw`, which is not UTF-8; None if none fits."""
    best, most = None, 0.0
    sample = raw[:_SAMPLE_BYTES]
    for name, expected in _CANDIDATES:
        try:
            text = sample.decode(name)
        except UnicodeDecodeError:
            continue
        beyond = [index for index, character in enumerate(text) if character > "\x7f"]
        score = sum(expected.match(text[index]) is not None for index in beyond) / max(1, len(beyond))
        if name in _WESTERN:
            score -= _runs(text, beyond) + _symbols_in_words(text, beyond)
        if name in _CYRILLIC:
            # In each of the two, lowercase letters of the other read as capitals.
            score -= 0.5 * sum(text[index].isupper() for index in beyond) / max(1, len(beyond))
        if score > most + 1e-9:
            best, most = name, score
    return best if most >= 0.5 else None


def _symbols_in_words(text: str, beyond: list[int]) -> float:
    """Fraction of non-ASCII characters that are symbols (such as ³) between two letters."""
    beside = {index: text[index - 1 : index] + text[index + 1 : index + 2] for index in beyond}
    in_words = [index for index in beyond if len(beside[index]) == 2 and beside[index].isalpha()]
    signs = [index for index in in_words if not text[index].isalpha() and text[index] not in "’–"]
    return len(signs) / max(1, len(beyond))


def _runs(text: str, beyond: list[int]) -> float:
    """Fraction of non-ASCII letters between two others: high for non-Latin alphabets."""
    letters = {index for index in beyond if text[index].isalpha()}
    return sum(index - 1 in letters and index + 1 in letters for index in letters) / max(1, len(beyond))


CHUNK_BYTES = 1 << 20
FREE_BYTES = 64 << 20
"""Unpacked bytes that are always allowed: small files of repeated rows compress very well."""
# A zstd block has at least 4 bytes and unpacks to at most 128 KiB: this much input gives at most 128 MiB at once.
_ZSTD_INPUT_BYTES = 4096


def compression(path: str) -> str:
    """The compression by a file's suffix: "gz", "zst" or "" for none."""
    suffix = Path(path).suffix.lower()
    return suffix[1:] if suffix in (".gz", ".zst") else ""


def require_regular(path: str) -> None:
    """Raise `DataError` for a pipe, socket or device: opening one may block forever."""
    kind = special_file(path)
    if kind:
        raise file_error(path, kind, "a regular file", "write the data into a file first, and give its path")


def chunks_of(path: str, max_expansion: int) -> Iterator[bytes]:
    """Yield the unpacked bytes of a file.

    Raises:
        DataError: a pipe, socket or device; a file that may not or cannot be read; broken compression; one that
            unpacks to more than `max_expansion` times its size.
        MissingRequirement: a .zst file without the `zstandard` package.
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
        raise file_error(path, "a file that is not readable", "a readable file", "check its permissions") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _broken_compression(path, "gzip", str(error)) from error
    except OSError as error:
        raise file_error(path, f"a file that cannot be read ({error.strerror or error})", "a readable file") from error


def check_expansion(path: str, unpacked: int, max_expansion: int) -> None:
    """Raise `DataError` if a packed file (a spreadsheet, for example) unpacks to too many bytes."""
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
        f"a complete {kind} file",
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
    """How text files are read.

    `encoding`: None for UTF-8, or UTF-16 with a byte order mark, which takes precedence. `max_line_bytes`: longest line
    of a data file. `max_expansion`: unpacked bytes per byte of a .gz or .zst file.
    """

    encoding: str | None = None
    max_line_bytes: int = MAX_LINE_BYTES
    max_expansion: int = MAX_EXPANSION


PLAIN_RULES = TextRules()


def read_lines(path: str, rules: TextRules = PLAIN_RULES) -> Generator[tuple[int, str], None, None]:
    """Yield `(number, line)` of a text file, from number 1, without line feeds.

    Raises:
        DataError: not a regular file, empty, not text, wrong encoding (with byte offset and line), a line over the
            limit, broken compression, or too large when unpacked.
        MissingRequirement: a .zst file without the `zstandard` package.
    """
    yield from _lines(path, rules, rules.max_line_bytes)


def read_text(path: str, rules: TextRules = PLAIN_RULES) -> str:
    """The whole text of a file with its line feeds, without a limit on lines; otherwise like `read_lines`."""
    return "\n".join(line for _, line in _lines(path, rules, None))


def split_lines(text: str) -> list[str]:
    """Split a text into lines by the same rule: at line feeds, or at carriage returns if it has none."""
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
    """Lines in an encoding whose line feed is the ASCII byte."""
    for number, raw in enumerate(_byte_lines(path, chunks, limit), start=1):
        try:
            line = raw.decode(encoding)
        except UnicodeDecodeError as error:
            position = offset + error.start
            actual = f"byte 0x{raw[error.start]:02x} at byte offset {position}, which is not {_display_name(encoding)}"
            column = len(raw[: error.start].decode(encoding, errors="replace")) + 1
            expected = _TEXT_EXPECTED if encoding == "utf-8" else f"{_display_name(encoding)} text"
            hint, remedy = _encoding_advice(raw, encoding)
            raise file_error(
                path, actual, expected, hint, line=number, column=column, field="encoding", remedy=remedy
            ) from error
        yield number, line
        offset += len(raw) + 1


def _display_name(encoding: str) -> str:
    return "UTF-8" if encoding == "utf-8" else encoding


def _encoding_advice(raw: bytes, encoding: str) -> tuple[str, Remedy]:
    guess = guessed_encoding(raw)
    if guess is None or guess == encoding:
        return "save the file as UTF-8", Remedy("or name its encoding", ((_ENCODING, "NAME"),))
    hint = f"this looks like {guess}: save the file as UTF-8"
    return hint, Remedy("or read it in that encoding and check the rows", ((_ENCODING, guess),))


def _wide_lines(path: str, data: bytes, encoding: str, limit: int | None) -> Iterator[tuple[int, str]]:
    """Lines in any other encoding; the text is decoded at once."""
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
    """Lines without their ends.

    The line end is decided at the first line feed, at the end of the file, or once a line would be over the limit.
    """
    pending: list[bytes] = []
    size, number = 0, 0
    line_end: bytes | None = None
    for chunk in chunks:
        if line_end is None and b"\n" in chunk:
            line_end = b"\n"
        pending.append(chunk)
        size += len(chunk)
        if line_end is None and limit is not None and size > limit:
            line_end = b"\r" if b"\r" in b"".join(pending)[:-1] else b"\n"
            pending = [b"".join(pending)]
        if line_end is not None and line_end in pending[-1]:
            *whole, rest = b"".join(pending).split(line_end)
            pending, size = [rest], len(rest)
            for line in whole:
                number += 1
                if limit is not None and len(line) > limit:
                    raise _too_long(path, number, limit)
                yield line
        if limit is not None and size > limit:
            raise _too_long(path, number + 1, limit)
    rest = b"".join(pending)
    if line_end is None and b"\r" in rest:
        *whole, rest = rest.split(b"\r")
        yield from whole
    if rest:
        yield rest


def _too_long(path: str, number: int, limit: int) -> DataError:
    return file_error(
        path,
        f"a line of more than {limit:,} bytes",
        "one row per line",
        "if this is a data file, raise data.max_line_bytes",
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
