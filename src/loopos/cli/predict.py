"""`loopos predict`: a prediction for every row of the input, in its order.

A row without text is an error and none is skipped, so that line n of the output always belongs to row n of the input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.cli.answers import as_cells, flat_row, output_format, refuse_unwritable, rendered, write, write_whole
from loopos.cli.options import (
    Columns,
    Device,
    Encoding,
    OutputFile,
    RunFolder,
    Verbose,
    argument,
    parse_columns,
    text_rules,
)
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.config.diagnostics import DataError, Diagnostic

if TYPE_CHECKING:
    from loopos.data.decoding import TextRules

STANDARD_INPUT = "-"
TEXT = "text"
"""Name of the input column for one text per line."""

Input = Annotated[
    str,
    argument("INPUT", "Data file, .txt with one text per line, or - for one text per line from standard input."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictOptions:
    """The options of `loopos predict`."""

    output: OutputFile = None
    format: Annotated[
        str | None, typer.Option("--format", help="jsonl, csv or tsv; default: by the suffix of -o, else jsonl.")
    ] = None
    columns: Columns = ()
    encoding: Encoding = None
    device: Device = "auto"
    verbose: Verbose = False


def run(path: RunFolder, source: Input, options: PredictOptions) -> int:
    """Predicts and writes. Raises `UserError`."""
    from loopos.cli.opened_models import require_task_model
    from loopos.data.formats import read_labeled
    from loopos.data.row_check import check_labeled
    from loopos.data.rows import read

    columns = parse_columns(options.columns)
    rules = text_rules(options.encoding)
    file_format = output_format(options.output, options.format)
    if options.output is not None:
        refuse_unwritable(options.output, source=source)
    model = require_task_model(str(path))
    if not _holds_lines(source, columns, rules):
        check_labeled(source, columns, require_label=False, remembered=model.columns, rules=rules)
    prepare_to_compute(verbose=options.verbose)
    texts = read_texts(source, columns, rules)
    from loopos.evaluation.predictor import open_predictor
    from loopos.training.precision import pick_device

    predictor = open_predictor(model, device=pick_device(options.device).type)
    if texts is not None:
        inputs: list[dict[str, object]] = [{TEXT: text} for text in texts]
        predictions = predictor.predict(texts)
    else:
        examples, report = read_labeled(
            read(source, rules=rules), columns, require_label=False, remembered=predictor.columns
        )
        inputs, predictions = [example.row.values for example in examples], predictor.predict_examples(examples)
        for sentence in report.notes:
            note(f"{source}: {sentence}")
    own = [_with_probability(prediction) for prediction in predictions]
    if file_format != "jsonl":
        inputs, own = [as_cells(row) for row in inputs], [flat_row(row) for row in own]
    rows, renamed = beside(inputs, own)
    for name, new in renamed.items():
        note(f'the input has a column "{name}"; the prediction is in "{new}"')
    written = rendered(rows, file_format)
    if options.output is None:
        write(written)
    else:
        write_whole(options.output, written)
        note(f"{options.output}: {len(rows)} predictions")
    return 0


def beside(
    inputs: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Each input row followed by its prediction, and new names for prediction columns that the input already has:
    "label" becomes "predicted_label".
    """
    taken = {name for row in inputs for name in row}
    names = dict.fromkeys(name for row in own for name in row)
    renamed: dict[str, str] = {}
    for name in names:
        if name in taken:
            new = f"predicted_{name}"
            number = 2
            while new in taken or new in names or new in renamed.values():
                new, number = f"predicted_{name}_{number}", number + 1
            renamed[name] = new
    return [
        {**row, **{renamed.get(name, name): value for name, value in prediction.items()}}
        for row, prediction in zip(inputs, own, strict=True)
    ], renamed


def read_texts(source: str, columns: Mapping[str, str], rules: TextRules) -> list[str] | None:
    """The texts of standard input or of a .txt file of plain lines; None for a data file, which is read by columns.

    A .txt file is data if `columns` are set, or if it holds JSON or a header that names a text column. Raises
    `DataError` for a blank line: it has no prediction, and skipping it would shift all following lines.
    """
    if not _holds_lines(source, columns, rules):
        return None
    if source == STANDARD_INPUT:
        return _checked("standard input", _standard_input_lines(rules))
    from loopos.data.decoding import read_lines

    note(f"{source}: read as one text per line")
    with closing(read_lines(source, rules)) as lines:
        return _checked(source, (line.rstrip("\r") for _, line in lines))


def _holds_lines(source: str, columns: Mapping[str, str], rules: TextRules) -> bool:
    """Whether a source is one text per line: standard input, or a .txt file that is no table."""
    if source == STANDARD_INPUT:
        return True
    return source.lower().endswith(".txt") and not columns and os.path.isfile(source) and not _is_data(source, rules)


def _standard_input_lines(rules: TextRules) -> list[str]:
    from loopos.data.decoding import split_lines

    content = sys.stdin.buffer.read()
    encoding = rules.encoding or "utf-8"
    try:
        lines = split_lines(content.decode(encoding))
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        name = rules.encoding or "UTF-8"
        actual = f"the byte {content[error.start]:#04x}, which is not {name}"
        raise DataError([Diagnostic("standard input", number, None, "encoding", actual, f"text in {name}")]) from error
    return [line.removesuffix("\r") for line in lines]


def _is_data(path: str, rules: TextRules) -> bool:
    from loopos.data.decoding import read_lines
    from loopos.data.formats import detect
    from loopos.data.rows import SAMPLE_LINES, read, sniff

    try:
        with closing(read_lines(path, rules)) as lines:
            chosen, _ = sniff(list(islice(lines, SAMPLE_LINES)), path)
        if chosen not in ("csv", "tsv"):
            return True
        detect(
            list(next(iter(read(path, max_rows=1, rules=rules).rows())).values), {}, require_label=False, source=path
        )
    except (DataError, StopIteration):
        return False
    return True


def _checked(source: str, lines: Iterable[str]) -> list[str]:
    texts = list(lines)
    blank = [number for number, text in enumerate(texts, start=1) if not text.strip()]
    if blank:
        raise DataError(
            [Diagnostic(source, number, None, "text", "a blank line", "one text per line") for number in blank]
        )
    if not texts:
        raise DataError([Diagnostic(source, None, None, "text", "no line", "one text per line")])
    return texts


def _with_probability(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """The prediction with the probability of the predicted label."""
    if "label" not in prediction:
        return dict(prediction)
    return {
        "label": prediction["label"],
        "probability": max(prediction["probabilities"].values()),
        **{name: value for name, value in prediction.items() if name != "label"},
    }
