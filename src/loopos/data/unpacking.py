"""A file → its bytes in chunks, unpacked where its name says .gz or .zst.

Enters: the path of a regular file, how far it may expand. Leaves: chunks of bytes. A small file that unpacks to
gigabytes is refused before the memory is taken: beyond `FREE_BYTES` the output may be at most `max_expansion` times the
size of the file. Left out: what the bytes mean (`decoding`).
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from loopos.config.faults import DataError, EnvironmentFault
from loopos.config.source import special_file
from loopos.data.record import file_error

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
        raise EnvironmentFault(
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
