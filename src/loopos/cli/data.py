"""`loopos data check` and `loopos data preview`: their options. What they do is in `data_check` and `data_preview`."""

from __future__ import annotations

from typing import Annotated

import typer

from loopos.cli.options import Columns, Config, Encoding, Json, Overrides, TrustRemoteCode, Verbose, argument
from loopos.cli.process import hush_libraries

DataFile = Annotated[str, argument("FILE", "File, folder, glob or hub id.")]
NumRows = Annotated[int, typer.Option("--rows", min=1, help="Number of rows to show.")]


def check(source: DataFile, columns: Columns = (), encoding: Encoding = None, json: Json = False) -> int:
    """Checks a data file and prints what was found. Raises `UserError` for a source that cannot be opened."""
    hush_libraries(verbose=False)
    from loopos.cli import data_check

    return data_check.run(source, columns, encoding=encoding, as_json=json)


def preview(
    path: Config,
    overrides: Overrides = (),
    rows: NumRows = 3,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = False,
) -> int:
    """Prints the first rows of a config's data. Raises `UserError`, as training would."""
    from loopos.cli import configs

    config = configs.read(path, overrides).config
    hush_libraries(verbose=verbose)
    from loopos.cli import data_preview

    data_preview.show(config, num_rows=rows, trust_remote_code=trust_remote_code)
    return 0
