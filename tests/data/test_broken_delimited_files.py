"""Broken CSV, TSV and text files, broken encodings and compression: each diagnostic names file, line and field."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard
from broken_files import Case, demand_diagnostic

GOOD = "text,label\ngood film,pos\nbad film,neg\n"
LONG = "".join(f"row number {number} of many,{'pos' if number % 2 else 'neg'}\n" for number in range(400))
LONG_CSV = "text,label\n" + LONG
GZ = gzip.compress(LONG_CSV.encode(), mtime=0)
ZST = zstandard.ZstdCompressor().compress(LONG_CSV.encode())


def _flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 0xFF]) + data[index + 1 :]


CASES = [
    # Cells
    Case("too few cells", "a.csv", "text,label\ngood,pos\nbad\n", 3, "label", "got 1 cell; expected 2"),
    Case("too few of three", "a.csv", "id,text,label\n1,good,pos\n2,bad\n", 3, "label", "2 cells"),
    Case("only the id", "a.csv", "id,text,label\n1\n2,bad,neg\n", 2, "text", "1 cell;"),
    Case("too many cells", "a.csv", "text,label\ngood,pos\nbad, really,neg\n", 3, "cell 3", "double quotes"),
    Case("trailing comma", "a.csv", "text,label\ngood,pos,\nbad,neg\n", 2, "cell 3", "3 cells"),
    Case("four cells", "a.csv", "text,label\na,b,c,d\n", 2, "cell 3", "4 cells"),
    Case("blanks only", "a.csv", "text,label\n  \ngood,pos\n", 2, "label", "1 cell"),
    Case("blank lines count", "a.csv", "text,label\n\n\ngood,pos\n\nbad\n", 6, "label", "1 cell"),
    Case("after a long record", "a.csv", 'text,label\n"a\nb\nc",pos\nbad\n', 5, "label", "1 cell"),
    Case("bad long record", "a.csv", 'text,label\ngood,pos\n"a\nb\nc"\n', 3, "label", "1 cell"),
    Case("CRLF", "a.csv", "text,label\r\ngood,pos\r\nbad\r\n", 3, "label", "1 cell"),
    Case("tsv too few", "a.tsv", "text\tlabel\ngood\tpos\nbad\n", 3, "label", "1 cell"),
    Case("tsv too many", "a.tsv", "text\tlabel\na\tb\tc\n", 2, "cell 3", "3 cells"),
    Case(
        "tsv with commas",
        "a.tsv",
        "text,label\ngood,pos\n",
        None,
        "data.columns.text",
        "Columns: 'text,label'",
        diagnostics=2,
    ),
    Case("semicolon rows", "a.csv", "text;label\ngood;pos\nbad\n", 3, "label", "1 cell"),
    Case("comma header, semicolons", "a.csv", "text,label\ngood;pos\n", 2, "label", "1 cell"),
    Case("sep line", "a.csv", "sep=;\ntext;label\ngood;pos;x\n", 3, "cell 3", "3 cells"),
    Case("two bad rows", "a.csv", "text,label\nbad\ngood,pos\nx,y,z\n", 2, "label", "1 cell", diagnostics=2),
    Case("21 bad rows", "a.csv", "text,label\n" + "bad\n" * 21, 2, "label", "and 1 more problems", diagnostics=20),
    Case("300 bad rows", "a.csv", "text,label\n" + "bad\n" * 300, 2, "label", "and 280 more", diagnostics=20),
    Case("NUL in text", "a.csv", "text,label\ngood,pos\nb\0ad,neg\n", 3, "text", "NUL"),
    Case("NUL in label", "a.csv", "text,label\ngood,p\0os\nbad,neg\n", 2, "label", "NUL"),
    Case("NUL in quotes", "a.csv", 'text,label\n"go\0od",pos\n', 2, "text", "NUL"),
    # Quotes
    Case("unclosed", "a.csv", 'text,label\ngood,pos\n"bad,neg\n', 3, "text", "never closed", 1),
    Case("unclosed, rows follow", "a.csv", 'text,label\n"bad,neg\na,pos\nb,neg\n', 2, "text", "never closed", 1),
    Case("unclosed label", "a.csv", 'text,label\ngood,"pos\n', 2, "label", "never closed", 6),
    Case("unclosed later cell", "a.csv", 'text,label\n"good\none","pos\n', 3, "label", "never closed", 6),
    Case("unclosed by doubling", "a.csv", 'text,label\n"good"",pos\n', 2, "text", "never closed", 1),
    Case("unclosed header", "a.csv", '"text,label\ngood,pos\n', 1, "header", "never closed", 1),
    Case("text after quote", "a.csv", 'text,label\n"good" one,pos\n', 2, "text", "followed by ' one,pos'", 1),
    Case("inner quotes", "a.csv", 'text,label\n"a "good" film",pos\n', 2, "text", 'is written ""', 1),
    Case("quote after label", "a.csv", 'text,label\ngood,"pos"!\n', 2, "label", "followed by '!'", 6),
    Case("closed by the next", "a.csv", 'text,label\n"one,pos\n"two",neg\n', 2, "text", "closed on line 3", 1),
    Case("header quote", "a.csv", '"text"x,label\ngood,pos\n', 1, "header", "followed by", 1),
    Case("tsv quote", "a.tsv", 'text\tlabel\n"Hello, he said\tpos\n', 2, "text", "never closed", 1),
    # Header
    Case("empty file", "a.csv", "", None, "file", "an empty file"),
    Case("blank file", "a.csv", "\n\n\n", 1, "file", "blank lines only"),
    Case("only a mark", "a.csv", b"\xef\xbb\xbf", 1, "file", "blank lines only"),
    Case("header only", "a.csv", "text,label\n", None, "rows", "no rows"),
    Case("header, no line end", "a.csv", "text,label", None, "rows", "no rows"),
    Case("header and blanks", "a.tsv", "text\tlabel\n\n\n", None, "rows", "a header without rows"),
    Case("same name twice", "a.csv", "text,label,text\na,b,c\n", 1, "header", "columns 1 and 3"),
    Case("same name, blanks", "a.csv", "text, text\na,b\n", 1, "header", "'text' twice"),
    Case("same name, line 3", "a.csv", "\n\nlabel,label\na,b\n", 3, "header", "twice"),
    Case("nameless last", "a.csv", "text,label,\na,b,c\n", 1, "header", "no name for column 3"),
    Case("nameless middle", "a.csv", "id,,label\na,b,c\n", 1, "header", "no name for column 2 of 3"),
    Case("NUL in header", "a.csv", "te\0xt,label\na,b\n", 1, "header", "NUL"),
    Case(
        "no header",
        "a.csv",
        "I love it,1\nI hate it,0\n",
        None,
        "data.columns.text",
        "first line must be the header",
        diagnostics=2,
    ),
    # Plain text
    Case("prose", "a.txt", "Dear Sir or Madam.\nI write to you.\n", 1, "format", "Dear Sir or Madam."),
    Case("prose with commas", "a.txt", "Well, yes.\nAnd no, no, no.\n", 1, "format", "plain text"),
    Case("prose after blanks", "a.txt", "\n\nOnce upon a time\n", 3, "format", "Once upon a time"),
    Case("one word", "a.txt", "hello\n", 1, "format", "header line"),
    Case("a list of lines", "a.txt", "good film\nbad film\n", 1, "format", "header line text,label"),
    Case("blank txt", "a.txt", " \n\n", 1, "file", "blank lines only"),
    Case("empty txt", "a.txt", "", None, "file", "an empty file"),
    Case("txt csv too few", "a.txt", "text,label\ngood,pos\nbad\n", 3, "label", "1 cell"),
    Case("txt tsv too many", "a.txt", "text\tlabel\na\tb\tc\n", 2, "cell 3", "3 cells"),
    Case("txt json line", "a.txt", '{"text": "a", "label": 1}\n{"text": "b", }\n', 2, "JSON", "valid JSON", 15),
    Case("txt json first line", "a.txt", '{"text": "a"\n{"text": "b", "label": 1}\n', 1, "JSON", "delimiter", 13),
    Case("txt array", "a.txt", '[{"text": "a", "label": 1}\n', 1, "JSON", "no closing ]", 27),
    # Encoding
    Case("latin-1", "a.csv", "text,label\ngood,pos\ncafé,neg\n".encode("latin-1"), 3, "encoding", "byte offset 23", 4),
    Case("latin-1 header", "a.csv", "téxt,label\na,b\n".encode("latin-1"), 1, "encoding", "byte 0xe9", 2),
    Case("cut character", "a.csv", "text,label\ngood é".encode()[:-1], 2, "encoding", "byte offset 16", 6),
    Case("windows quotes", "a.jsonl", b'{"text": "\x93hi\x94", "label": 1}\n', 1, "encoding", "data.encoding", 11),
    Case("after a mark", "a.csv", b"\xef\xbb\xbftext,label\n\xff,b\n", 2, "encoding", "byte offset 14", 1),
    Case("UTF-16 unmarked", "a.csv", GOOD.encode("utf-16-le"), 1, "encoding", "UTF-16 without"),
    Case("UTF-16 big unmarked", "a.csv", GOOD.encode("utf-16-be"), 1, "encoding", "UTF-16 without"),
    Case("UTF-16 cut", "a.csv", GOOD.encode("utf-16")[:-1], 3, "encoding", "not UTF-16"),
    Case("UTF-32", "a.csv", b"\xff\xfe\x00\x00" + GOOD.encode("utf-32-le"), 1, "encoding", "UTF-32"),
    Case("a spreadsheet", "a.csv", b"PK\x03\x04" + bytes(40), 1, "encoding", ".xlsx"),
    Case("parquet as csv", "a.csv", b"PAR1" + bytes(40), 1, "encoding", "a parquet file"),
    Case("a PDF", "a.txt", b"%PDF-1.4 etc", 1, "encoding", "PDF"),
    Case("gzip as csv", "a.csv", GZ, 1, "encoding", "gzip data"),
    Case("zstd as jsonl", "a.jsonl", ZST, 1, "encoding", "zstd data"),
    Case("gzip twice", "a.csv.gz", gzip.compress(GZ), 1, "encoding", "gzip data"),
    # Compression
    Case("gzip cut", "a.csv.gz", GZ[:-20], None, "compression", "gzip"),
    Case("gzip without its sum", "a.csv.gz", GZ[:-8], None, "compression", "a complete gzip file"),
    Case("gzip flipped", "a.csv.gz", _flipped(GZ, len(GZ) - 6), None, "compression", "gzip"),
    Case("csv as gzip", "a.csv.gz", GOOD, None, "compression", "correct its suffix"),
    Case("empty gzip", "a.csv.gz", gzip.compress(b""), None, "file", "an empty file"),
    Case("empty file as gzip", "a.csv.gz", b"", None, "file", "an empty file"),
    Case("zstd cut", "a.csv.zst", ZST[:-9], None, "compression", "zstd"),
    Case("zstd header only", "a.csv.zst", ZST[:3], None, "compression", "zstd"),
    Case("zstd flipped", "a.csv.zst", _flipped(ZST, 1), None, "compression", "a complete zstd file"),
    Case("csv as zstd", "a.csv.zst", GOOD, None, "compression", "zstd"),
    Case("empty zstd", "a.csv.zst", zstandard.compress(b""), None, "file", "an empty file"),
    Case("bad row in gzip", "a.csv.gz", gzip.compress(b"text,label\ngood,pos\nbad\n"), 3, "label", "1 cell"),
    Case("bad row in zstd", "a.tsv.zst", zstandard.compress(b"text\tlabel\nbad\n"), 2, "label", "1 cell"),
    Case("latin-1 in gzip", "a.csv.gz", gzip.compress(b"text,label\n\xe9,b\n"), 2, "encoding", "byte offset 11"),
    # File names
    Case("xls", "a.xls", b"PK", None, "file name", "'.xls'"),
    Case("xlsx cut off", "a.xlsx", b"PK", None, "xlsx", "not a zip file"),
    Case("no suffix", "data", GOOD, None, "file name", "without a suffix"),
    Case("gz alone", "a.gz", GZ, None, "file name", "'.gz'"),
    Case("parquet gz", "a.parquet.gz", GZ, None, "file name", "'.parquet.gz'"),
    Case("zip", "a.csv.zip", b"PK", None, "file name", ".csv.zip"),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_broken_file_ends_in_a_diagnostic_with_its_position(case: Case, tmp_path: Path) -> None:
    demand_diagnostic(case, tmp_path)


def test_the_cases_differ() -> None:
    assert len({(case.file, case.content) for case in CASES}) == len(CASES) >= 90
