"""Weights come from the files that transformers opens; wrong indexes and non-finite numbers are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import save_pico
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopos.config.diagnostics import UserError
from loopos.config.merge import MergeConfig
from loopos.exporting.export import Exported, export
from loopos.exporting.settings import ExportSettings
from loopos.merging.merge import merge
from loopos.models.folders import open_language_model, save_language_model
from loopos.models.load import load_pretrained
from loopos.storage.tensor_files import folder_tensors

IDS = torch.tensor([[3, 390, 17, 8, 250]])
CHATML = (
    "{% for m in messages %}{{ '<bos>' + m['role'] + ': ' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant: ' }}{% endif %}"
)


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    found: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).logits
    return found


def shipped(path: Path, out: Path, output_format: str = "huggingface", **named: Any) -> Exported:
    return export(str(path), out, ExportSettings(format=output_format, **named))


def merged(path: Path, out: Path) -> Path:
    models = [{"model": str(path)}, {"model": str(path)}]
    merge(MergeConfig.model_validate({"method": "linear", "models": models, "output_dir": str(out)}))
    return out


@pytest.fixture
def shards(pico_folder: Path, tmp_path: Path) -> Path:
    """The pico model in shards, with an index."""
    folder = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(pico_folder).save_pretrained(folder, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(pico_folder).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("gone", [False, True])
def test_a_whole_file_takes_precedence_over_a_stale_index(
    gone: bool, shards: Path, tmp_path: Path, pico_tokenizer: Path
) -> None:
    """As in transformers, whether the shards of the index are there or not."""
    torch.manual_seed(7)
    other = save_pico("llama", tmp_path / "other", pico_tokenizer)
    weights = {name: tensor + 0.01 for name, tensor in load_file(other / "model.safetensors").items()}
    if gone:
        for file in shards.glob("model-*.safetensors"):
            file.unlink()
    save_file(weights, shards / "model.safetensors", {"format": "pt"})
    expected = logits(shards)
    done = shipped(shards, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), expected)
    assert done.bytes_before == (shards / "model.safetensors").stat().st_size
    torch.testing.assert_close(logits(merged(shards, tmp_path / "merged")), expected)
    found = open_language_model(str(shards)).model.eval()
    torch.testing.assert_close(found(input_ids=IDS).logits.detach(), expected)


def test_the_file_that_a_config_names_takes_precedence(pico_folder: Path, tmp_path: Path) -> None:
    """transformers_weights, which transformers 5 reads."""
    folder = tmp_path / "named"
    shutil.copytree(pico_folder, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.1 for name, tensor in weights.items()}, folder / "best.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "best.safetensors"}))
    expected = logits(folder)
    assert not torch.equal(expected, logits(pico_folder))
    torch.testing.assert_close(logits(merged(folder, tmp_path / "merged")), expected)
    shipped(folder, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), expected)
    load_pretrained(str(folder), causal=True).model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), expected)


def _outside(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    shutil.copy(folder / index["weight_map"][first], folder.parent / "outside.safetensors")
    index["weight_map"][first] = "../outside.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _overlapping(folder: Path) -> None:
    """Two tensors of one shape are the same bytes."""
    file = max(folder.glob("model-*.safetensors"), key=lambda file: len(load_file(file)))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    by_shape: dict[str, list[str]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            by_shape.setdefault(str(entry["shape"]), []).append(name)
    one, other, *_ = next(names for names in by_shape.values() if len(names) > 1)
    header[one]["data_offsets"] = header[other]["data_offsets"]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _not_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')


def _nested(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[" * 50_000)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_outside, r"names \.\./outside\.safetensors, which is outside the folder"),
        (_overlapping, "overlaps|belong to no tensor|cannot load|InvalidOffset"),
        (_not_named, "no weight_map from tensors to files"),
        (_nested, "broken: nested too deeply"),
    ],
)
def test_a_wrong_index_is_reported(spoil: Callable[[Path], None], message: str, shards: Path, tmp_path: Path) -> None:
    """By every command that opens weights; nothing is written."""
    spoil(shards)
    for opened in (
        lambda: shipped(shards, tmp_path / "out", check=False),
        lambda: merged(shards, tmp_path / "merged"),
        lambda: load_pretrained(str(shards), causal=True),
    ):
        with pytest.raises(UserError, match=message) as told:
            opened()
        assert len(str(told.value).splitlines()) <= 2
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["shards"]


def test_bytes_that_belong_to_no_tensor_are_reported(pico_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "longer"
    shutil.copytree(pico_folder, folder)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(bytes(8))
    with pytest.raises(UserError, match="8 bytes after the last tensor belong to none"):
        folder_tensors(folder)


@pytest.fixture
def chatting(pico_folder: Path, tmp_path: Path) -> Path:
    """The pico model with a chat template."""
    folder = tmp_path / "chatting"
    shutil.copytree(pico_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def test_loopos_opens_its_own_gguf(chatting: Path, tmp_path: Path) -> None:
    """The tokenizer in the file makes the same tokens, has as many, and writes turns alike."""
    pytest.importorskip("gguf")
    shipped(chatting, tmp_path / "out", "gguf", type="f32", check=False)
    opened = open_language_model(str(tmp_path / "out" / "out-F32.gguf"))
    own = AutoTokenizer.from_pretrained(chatting)
    assert opened.tokenizer.get_vocab() == own.get_vocab()
    assert opened.tokenizer.chat_template == CHATML
    assert opened.tokenizer.all_special_tokens == own.all_special_tokens
    for text in ("the  box 12 34x\n\nopen<eos> <bos>ÄÖ ☃", "<pad>", "", " ", "a" * 300):
        ids = own(text)["input_ids"]
        assert opened.tokenizer(text)["input_ids"] == ids
        assert opened.tokenizer.decode(ids) == own.decode(ids)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_neither_exported_nor_saved(bad: float, pico_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(pico_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told = r"model\.layers\.1\.mlp\.up_proj\.weight: .*(not |non-)finite"
    for output_format, kind in (("huggingface", None), ("huggingface", "bf16"), ("gguf", "f16"), ("gguf", "q8_0")):
        with pytest.raises(UserError, match=told):
            shipped(folder, tmp_path / "out", output_format, type=kind, check=False)
    with pytest.raises(UserError, match=told):
        merged(folder, tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UserError, match=told):
        save_language_model(tmp_path / "out", model, tokenizer, {"precision": "fp32", "stop_tokens": [2]})
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
