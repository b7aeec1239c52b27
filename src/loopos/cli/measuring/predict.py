"""`loopos predict`: a prediction for every row of the input, in its order and number.

Enters: a run and a data file, a text file of one text a line, or standard input. Leaves: JSON Lines, CSV or TSV. A row
without text is an error and none is skipped, so that line n of the output always belongs to row n of the input.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from loopos.cli.answers import json_lines, write
from loopos.cli.columns import parse_columns
from loopos.cli.opened_models import require_task_model
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.config.faults import DataError, Fault, UserError
from loopos.data import sniff
from loopos.data.column_check import check_labelled
from loopos.data.decoding import read_lines, split_lines
from loopos.data.formats import detect
from loopos.data.rows import read
from loopos.storage.writable import require_writable

FORMATS = ("jsonl", "csv", "tsv")
STANDARD_INPUT = "-"


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """The options of `loopos predict`."""

    output: Path | None = None
    format: str | None = None
    columns: tuple[str, ...] = ()
    device: str = "auto"
    verbose: bool = False


def run(place: Path, source: str, options: PredictOptions) -> int:
    """Predicts and writes. Raises `UserError`."""
    columns = parse_columns(options.columns)
    file_format = output_format(options.output, options.format)
    if options.output is not None:
        refuse_unwritable(options.output)
    if options.output is not None and source != STANDARD_INPUT and _same_file(options.output, source):
        raise UserError(f"--output: given {options.output}, which is the input; wanted another file")
    require_task_model(str(place))
    if not holds_lines(source, columns):
        check_labelled(source, columns, require_label=False)
    restart_with_settings()
    texts = read_texts(source, columns)
    hush_libraries(verbose=options.verbose)
    from loopos.evaluation.ensemble import open_predictor
    from loopos.training.precision import pick_device

    predictor = open_predictor(place, device=pick_device(options.device).type)
    predictions = predictor.predict(texts) if texts is not None else predictor.predict_file(source, columns)
    written = rendered(predictions, file_format)
    if options.output is None:
        write(written)
    else:
        write_whole(options.output, written)
        note(f"{options.output}: {len(predictions)} predictions")
    return 0


def output_format(output: Path | None, asked: str | None) -> str:
    """The format that was asked for, or that the output's suffix says, or JSON Lines. Raises `UserError`."""
    suffix = output.suffix.lower().lstrip(".") if output is not None else ""
    found = asked or {"ndjson": "jsonl"}.get(suffix, suffix) or FORMATS[0]
    if found not in FORMATS:
        given = f"--format: given {asked}" if asked else f"--output: given the suffix .{suffix}"
        raise UserError(f"{given}; wanted one of {', '.join(FORMATS)}")
    return found


def read_texts(source: str, columns: Mapping[str, str]) -> list[str] | None:
    """The texts of standard input or of a .txt file of plain lines; None for a data file, which is read by columns.

    A .txt file is data if `columns` are given, or if it holds JSON or a header that names a text column. Raises
    `DataError` for a blank line: it has no prediction, and leaving it out would shift all that follow.
    """
    if not holds_lines(source, columns):
        return None
    if source == STANDARD_INPUT:
        return _checked("standard input", _standard_input_lines())
    note(f"{source}: read as one text a line")
    with closing(read_lines(source)) as lines:
        return _checked(source, (line.rstrip("\r") for _, line in lines))


def holds_lines(source: str, columns: Mapping[str, str]) -> bool:
    """Whether a source is one text a line: standard input, or a .txt file that is no data."""
    if source == STANDARD_INPUT:
        return True
    return source.lower().endswith(".txt") and not columns and os.path.isfile(source) and not _is_data(source)


def _standard_input_lines() -> list[str]:
    content = sys.stdin.buffer.read()
    try:
        lines = split_lines(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        given = f"the byte {content[error.start]:#04x}, which is not UTF-8"
        raise DataError([Fault("standard input", number, None, "encoding", given, "text in UTF-8")]) from error
    return [line.removesuffix("\r") for line in lines]


def _is_data(path: str) -> bool:
    try:
        with closing(read_lines(path)) as lines:
            chosen, _ = sniff.sniff(list(islice(lines, sniff.SAMPLE_LINES)), path)
        if chosen not in ("csv", "tsv"):
            return True
        detect(list(next(iter(read(path, max_rows=1).rows())).values), {}, require_label=False, source=path)
    except (DataError, StopIteration):
        return False
    return True


def _checked(source: str, lines: Iterable[str]) -> list[str]:
    texts = list(lines)
    blank = [number for number, text in enumerate(texts, start=1) if not text.strip()]
    if blank:
        raise DataError([Fault(source, number, None, "text", "a blank line", "one text a line") for number in blank])
    if not texts:
        raise DataError([Fault(source, None, None, "text", "no line", "one text a line")])
    return texts


def rendered(predictions: Sequence[Mapping[str, Any]], file_format: str) -> str:
    """The predictions as text, one a line."""
    rows = [_with_probability(prediction) for prediction in predictions]
    if file_format == "jsonl":
        return json_lines(rows)
    flat = [_flat(row) for row in rows]
    written = io.StringIO()
    table = csv.DictWriter(written, list(flat[0]), delimiter="," if file_format == "csv" else "\t", lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    return written.getvalue()


def _with_probability(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """The prediction with the probability of the label that was chosen."""
    if "label" not in prediction:
        return dict(prediction)
    return {
        "label": prediction["label"],
        "probability": max(prediction["probabilities"].values()),
        **{name: value for name, value in prediction.items() if name != "label"},
    }


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table: the labels of one text joined by |, a column `probability_CLASS` for each class (of a majority
    `votes_CLASS` too).
    """
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name == "probabilities":
            flat |= {f"probability_{each}": probability for each, probability in value.items()}
        elif isinstance(value, Mapping):
            flat |= {f"{name}_{each}": number for each, number in value.items()}
        elif isinstance(value, list):
            flat[name] = "|".join(map(str, value))
        else:
            flat[name] = value
    return flat


def refuse_unwritable(path: Path) -> None:
    """Raises `UserError` for a file that could not be written: said before the work, and not after it."""
    folder = path.absolute().parent
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; name a file")
    if not folder.is_dir():
        raise UserError(f"--output: {path}: there is no folder {folder}; make it, or name another place")
    require_writable("data.output_dir", folder)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is whole or not there. Raises `UserError` for a folder that is not there or not writable."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        # Where nothing can be written, nothing can be removed either, and nothing was left.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"--output: {path}: cannot be written ({error.strerror}); name another place") from error


def _same_file(output: Path, source: str) -> bool:
    return output.exists() and os.path.exists(source) and os.path.samefile(output, source)
