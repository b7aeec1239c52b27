"""Every kind of source opens as the same model with its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pico_runs import hidden_states, write_weight_files
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from loopos.models.load import Sizes, load_pretrained

# The pico model's sizes, as a config would give them beside a bare file.
SIZES = Sizes(d_model=32, num_heads=4, num_key_value_heads=2, num_layers=2, d_ff=64, vocab_size=400)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    return write_weight_files(tmp_path_factory.mktemp("parts"), pico_folder)


def test_every_source_opens_to_the_same_model(parts: Path, pico_folder: Path) -> None:
    expected = hidden_states(load_pretrained(str(pico_folder)).model)
    for actual, sizes in (
        (parts / "with" / "weights.safetensors", Sizes()),
        (parts / "with" / "weights.bin", Sizes()),
        (parts / "bare" / "weights.safetensors", SIZES),
        (parts / "bare" / "weights.bin", SIZES),
    ):
        opened = load_pretrained(str(actual), sizes=sizes)
        torch.testing.assert_close(hidden_states(opened.model), expected, atol=1e-6, rtol=0)
        assert len(opened.tokenizer) <= 400
        assert "LlamaModel" in opened.summary


def test_half_precision_files_open_in_fp32(parts: Path, tmp_path: Path, pico_folder: Path) -> None:
    shutil.copytree(parts / "with", tmp_path / "half")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(pico_folder / "model.safetensors").items()}
    save_file(tensors, tmp_path / "half" / "weights.safetensors")
    model = load_pretrained(str(tmp_path / "half" / "weights.safetensors")).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    name = "layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(
        dict(model.named_parameters())[name].detach(), tensors[f"model.{name}"].float(), atol=0, rtol=0
    )


def test_the_fingerprint_distinguishes_weights(parts: Path, tmp_path: Path, pico_folder: Path) -> None:
    one = load_pretrained(str(parts / "with" / "weights.bin")).fingerprint
    assert load_pretrained(str(pico_folder)).fingerprint == one
    shutil.copytree(pico_folder, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.5
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert load_pretrained(str(tmp_path / "other")).fingerprint != one


# New models and their tokenizers -----------------------------------------------------------------------------------


def test_a_new_model_has_the_guides_sizes(pico_tokenizer: Path) -> None:
    sizes = Sizes(d_model=48, num_heads=4, num_layers=3, d_ff=96, vocab_size=500, max_length=4096)
    torch.manual_seed(1)
    opened = load_pretrained("new", sizes=sizes, tokenizer=str(pico_tokenizer))
    config = opened.model.config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (48, 4, 3)
    assert (config.intermediate_size, config.vocab_size, config.head_dim) == (96, 500, 12)
    assert config.num_key_value_heads == 4
    assert config.max_position_embeddings == 4096
    # By hand: embeddings, then a layer's four square projections, three of the feed-forward, two norms; the last norm.
    assert sum(p.numel() for p in opened.model.parameters()) == 500 * 48 + 3 * (4 * 48 * 48 + 3 * 48 * 96 + 2 * 48) + 48


@pytest.mark.parametrize("form", ["folder", "tokenizer.json", "a file of another name", "a trained run"])
def test_a_tokenizer_is_opened_from_every_kind_of_source(form: str, pico_tokenizer: Path, tmp_path: Path) -> None:
    sources = {"folder": pico_tokenizer, "tokenizer.json": pico_tokenizer / "tokenizer.json"}
    if form == "a file of another name":
        sources[form] = Path(shutil.copy(pico_tokenizer / "tokenizer.json", tmp_path / "mine.json"))
    elif form == "a trained run":
        shutil.copytree(pico_tokenizer, tmp_path / "run" / "model")
        sources[form] = tmp_path / "run"
    sizes = Sizes(d_model=16, num_heads=2, num_layers=1, d_ff=16, vocab_size=400)
    opened = load_pretrained("new", sizes=sizes, tokenizer=str(sources[form])).tokenizer
    expected = AutoTokenizer.from_pretrained(pico_tokenizer)
    assert opened("good value")["input_ids"] == expected("good value")["input_ids"]
