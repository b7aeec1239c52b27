"""Bytes of a file → numbered lines of text.

Enters: the path of a text file, plain or compressed (.gz, .zst). Leaves: its lines, 1-based, decoded from UTF-8 (with
or without a byte order mark) or from UTF-16 with one. Lines end at the line feed alone: a carriage return before it
stays on the line, so that a quoted CSV cell keeps it; readers strip it at the end of a record.
Left out: guessing other encodings. A wrong guess trains on garbled text, so those are faults with the byte's place.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

from loopos.config.faults import DataError, EnvironmentFault
from loopos.data.record import file_error

CHUNK_BYTES = 1 << 20
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
_TEXT_WANTED = "UTF-8 text (or UTF-16 with a byte order mark)"


def compression(path: str) -> str:
    """The compression that a file's name states: "gz", "zst" or "" for none."""
    suffix = Path(path).suffix.lower()
    return suffix[1:] if suffix in (".gz", ".zst") else ""


def read_lines(path: str) -> Generator[tuple[int, str], None, None]:
    """Yields `(number, line)` of a text file, numbers from 1, without the line feed.

    Raises:
        DataError: empty file, not text, another encoding (byte offset and line), broken compression.
        EnvironmentFault: a .zst file without the `zstandard` package.
    """
    chunks = _chunks(path)
    head = next(chunks, b"")
    if not head:
        raise file_error(path, "an empty file", "rows of data", "check the path, or how the file was made")
    _check_signature(path, head)
    if head.startswith(_UTF16_MARKS):
        yield from _utf16_lines(path, b"".join([head, *chunks]))
        return
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    yield from _utf8_lines(path, head[start:], chunks, start)


def read_text(path: str) -> str:
    """The whole text of a file; as `read_lines`, with every line feed kept (a JSON document needs it in one piece)."""
    return "\n".join(line for _, line in read_lines(path))


def _utf8_lines(path: str, head: bytes, chunks: Iterator[bytes], offset: int) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(_byte_lines(head, chunks), start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            place = offset + error.start
            raise file_error(
                path,
                f"byte 0x{raw[error.start]:02x} at byte offset {place}, which is not UTF-8",
                _TEXT_WANTED,
                "convert the file, for example: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
                line=number,
                column=len(raw[: error.start].decode("utf-8")) + 1,
                field="encoding",
            ) from error
        yield number, line
        offset += len(raw) + 1


def _utf16_lines(path: str, data: bytes) -> Iterator[tuple[int, str]]:
    try:
        text = data.decode("utf-16")
    except UnicodeDecodeError as error:
        readable = data[: error.start].decode("utf-16", errors="ignore")
        raise file_error(
            path,
            f"bytes at byte offset {error.start} that are not UTF-16, as the byte order mark says",
            _TEXT_WANTED,
            "save the file again as UTF-8",
            line=readable.count("\n") + 1,
            field="encoding",
        ) from error
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    yield from enumerate(lines, start=1)


def _byte_lines(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    pending = [head]
    while True:
        pieces = b"".join(pending).split(b"\n") if b"\n" in pending[-1] else None
        if pieces is not None:
            pending = [pieces.pop()]
            yield from pieces
        chunk = next(chunks, None)
        if chunk is None:
            break
        pending.append(chunk)
    rest = b"".join(pending)
    if rest:
        yield rest


def _check_signature(path: str, head: bytes) -> None:
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            raise file_error(
                path,
                name,
                f"{_TEXT_WANTED}, as the file's name says",
                "name the file after its content (.csv.gz, .jsonl.zst, .parquet, .arrow), or export it as CSV or JSON",
                line=1,
                field="encoding",
            )
    sample = head[:400]
    if len(sample) >= 8 and 0 in sample and not head.startswith(_UTF16_MARKS):
        even, odd = sample[0::2].count(0) * 2, sample[1::2].count(0) * 2
        if max(even, odd) > 0.8 * len(sample) and min(even, odd) < 0.2 * len(sample):
            raise file_error(
                path,
                "what looks like UTF-16 without a byte order mark",
                _TEXT_WANTED,
                "save the file again as UTF-8",
                line=1,
                field="encoding",
            )


def _chunks(path: str) -> Iterator[bytes]:
    reader = {"gz": _gzip_chunks, "zst": _zstd_chunks}.get(compression(path), _plain_chunks)
    try:
        yield from reader(path)
    except PermissionError as error:
        raise file_error(path, "a file that may not be read", "a readable file", "check its permissions") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _broken_compression(path, "gzip", str(error)) from error


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
        raise EnvironmentFault(
            f"{path}: reading .zst files needs the package zstandard: pip install zstandard"
        ) from error
    decompressor, begun = zstandard.ZstdDecompressor().decompressobj(), False
    try:
        for chunk in _plain_chunks(path):
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
