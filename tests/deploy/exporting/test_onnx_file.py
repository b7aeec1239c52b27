"""An ONNX graph says of padded texts what the model says of each alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pico_runs import class_rows, config_of, save_pico, train

import loopos
from loopos.config.faults import EnvironmentFault, UserError
from loopos.deploy.export import export
from loopos.deploy.export_settings import ExportSettings
from loopos.deploy.exporting import onnx_file
from loopos.functional.packing import PackedLayout
from loopos.models.heads import POOLINGS, pool


@pytest.mark.parametrize("how", POOLINGS)
def test_padded_pooling_is_that_of_packed_rows(how: str) -> None:
    lengths = (5, 2, 1)
    rows = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(0))
    padded, mask = torch.full((3, 5, 3), 99.0), torch.zeros(3, 5, dtype=torch.long)
    for number, part in enumerate(rows.split(lengths)):
        padded[number, : len(part)], mask[number, : len(part)] = part, 1
    expected = pool(rows, PackedLayout(lengths, torch.device("cpu")), how)
    torch.testing.assert_close(onnx_file.pooled(padded, mask, how), expected)


def test_a_language_model_and_a_missing_package_are_told(
    pico_folder: Path, tmp_path: Path, pico_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="a language model; --format onnx"):
        export(str(pico_folder), tmp_path / "out", ExportSettings(format="onnx"))
    encoder = save_pico("bert", tmp_path / "bert", pico_tokenizer)
    monkeypatch.setattr(onnx_file, "_PACKAGES", ("no_such_package",))
    with pytest.raises(EnvironmentFault, match="needs no_such_package; run pip install"):
        export(str(encoder), tmp_path / "out", ExportSettings(format="onnx"))
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_head(pico_folder: Path, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime
    from transformers import AutoTokenizer

    train(config_of(tmp_path / "run", pico_folder, class_rows(24), training={"num_epochs": 1}))
    done = export(str(tmp_path / "run"), tmp_path / "out", ExportSettings(format="onnx"))
    assert done.check is not None
    assert done.check.largest <= 1e-4
    texts = ["good film", "where is it, the parcel came late and nobody replies", "bad"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    given = tokenizer(texts, padding=True, padding_side="right", return_tensors="np")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    wanted = {each.name for each in session.get_inputs()}
    [logits] = session.run(None, {name: value for name, value in given.items() if name in wanted})
    found = torch.softmax(torch.from_numpy(logits), -1)
    for row, answer in zip(found.tolist(), loopos.load(tmp_path / "run").predict(texts), strict=True):
        assert row == pytest.approx(list(answer["probabilities"].values()), abs=1e-4)
