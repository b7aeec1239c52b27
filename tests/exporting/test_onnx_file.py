"""An ONNX graph gives for padded texts the outputs of the model for each text on its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pico_runs import save_pico
from transformers import AutoModel

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.exporting import onnx as onnx_file
from loopos.exporting.export import export
from loopos.exporting.settings import ExportSettings
from loopos.functional.packing import PackedLayout
from loopos.models.heads import POOLINGS, pool
from loopos.models.modeling_loopos import pooled


@pytest.mark.parametrize("how", POOLINGS)
def test_padded_pooling_is_that_of_packed_rows(how: str) -> None:
    lengths = (5, 2, 1)
    rows = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(0))
    padded, mask = torch.full((3, 5, 3), 99.0), torch.zeros(3, 5, dtype=torch.long)
    for number, part in enumerate(rows.split(lengths)):
        padded[number, : len(part)], mask[number, : len(part)] = part, 1
    expected = pool(rows, PackedLayout(lengths, torch.device("cpu")), how)
    torch.testing.assert_close(pooled(padded, mask, how), expected)


def test_a_language_model_and_a_missing_package_are_reported(
    pico_folder: Path, tmp_path: Path, pico_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="a language model; --format onnx"):
        export(str(pico_folder), tmp_path / "out", ExportSettings(format="onnx"))
    encoder = save_pico("bert", tmp_path / "bert", pico_tokenizer)
    monkeypatch.setattr(onnx_file, "_PACKAGES", ("no_such_package",))
    with pytest.raises(MissingRequirement, match=r"needs no_such_package; run\s+pip install"):
        export(str(encoder), tmp_path / "out", ExportSettings(format="onnx"))
    assert not (tmp_path / "out").exists()


def test_an_encoder_with_segments(tmp_path: Path, pico_tokenizer: Path) -> None:
    """The hidden states of padded texts are those of each text on its own."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    encoder = save_pico("bert", tmp_path / "bert", pico_tokenizer)
    done = export(str(encoder), tmp_path / "out", ExportSettings(format="onnx"))
    assert done.check is not None
    assert done.check.largest <= 1e-4
    ids = torch.arange(5, 17)[None]
    found = onnx_file.onnx_outputs(tmp_path / "out" / "model.onnx", ids)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(encoder)(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
