"""Damaged or hostile model files: one line that names the file, before the model is used."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from loopos.config.diagnostics import UserError
from loopos.config.sections import LoraSection
from loopos.exporting.export import ExportSettings, export
from loopos.models.adapter_folder import open_adapter_folder
from loopos.models.adapters import add_lora
from loopos.models.config_check import OWN_MODEL_TYPE, check_config
from loopos.models.description import read_description
from loopos.models.folders import open_language_model, save_language_model, save_pretrained
from loopos.models.language_model import LanguageModel
from loopos.models.load import load_pretrained
from loopos.models.modeling_loopos import LoopOSConfig
from loopos.models.saved_adapters import save_lora
from loopos.storage.json_files import save_json
from loopos.storage.manifest import check_manifest
from loopos.storage.tensor_files import folder_tensors, weight_files

MANIFEST = "loopos-manifest.json"
DESCRIPTION: dict[str, Any] = {"method": "ppo", "stop_tokens": [2], "precision": "fp32"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """A trained language model as a run leaves it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    opened = load_pretrained(str(pico_folder), causal=True)
    save_language_model(folder, opened.model, opened.tokenizer, DESCRIPTION)
    return folder


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def flip(file: Path, index: int) -> None:
    """Flips one bit."""
    content = bytearray(file.read_bytes())
    content[index] ^= 1 << (index % 8)
    file.write_bytes(bytes(content))


def test_a_saved_model_has_a_manifest_of_its_files(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "loopos.json"}
    assert names <= set(manifest["files"])
    for name, entry in manifest["files"].items():
        content = (saved / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    # Other programs do not mind it.
    assert isinstance(AutoModelForCausalLM.from_pretrained(saved), nn.Module)


def test_one_flipped_bit_is_found_in_every_file(saved: Path, tmp_path: Path) -> None:
    folder, found = copied(saved, tmp_path / "model"), 0
    for name in json.loads((saved / MANIFEST).read_text())["files"]:
        file = folder / name
        size = file.stat().st_size
        for index in range(size // 14, size, size // 7):
            flip(file, index)
            with pytest.raises(UserError) as caught:
                open_language_model(str(folder))
            assert str(caught.value).startswith(f"{file}: damaged or changed: its SHA-256 differs from the saved one")
            assert "\n" not in str(caught.value)
            assert f"delete {MANIFEST}" in str(caught.value)
            flip(file, index)
            found += 1
    assert found >= 42
    flip(folder / MANIFEST, 200)
    with pytest.raises(UserError, match=MANIFEST):
        open_language_model(str(folder))
    flip(folder / MANIFEST, 200)
    assert open_language_model(str(folder)).description["precision"] == "fp32"


def test_what_is_found_by_size_and_what_is_not_covered(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "model")
    (folder / "README.md").write_text("mine")
    check_manifest(folder)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    size = (saved / "model.safetensors").stat().st_size
    with pytest.raises(UserError, match=rf"{size + 1:,} bytes; it was saved with {size:,}"):
        folder_tensors(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read: No such file"):
        open_language_model(str(folder))
    shutil.copy(saved / "model.safetensors", folder)
    # Changed on purpose: the remedy of the message.
    config = json.loads((folder / "config.json").read_text())
    save_json(folder / "config.json", {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}})
    with pytest.raises(UserError, match=r"config\.json: damaged or changed"):
        open_language_model(str(folder))
    (folder / MANIFEST).unlink()
    assert open_language_model(str(folder)).model.config.rope_parameters["rope_theta"] == 5.0


def test_weights_with_a_name_of_their_own_share_a_manifest(saved: Path, tmp_path: Path) -> None:
    opened = open_language_model(str(saved))
    for name in ("one.bin", "two.bin"):
        save_pretrained(tmp_path / name, opened.model, opened.tokenizer)
    assert {"one.bin", "two.bin", "config.json"} <= set(json.loads((tmp_path / MANIFEST).read_text())["files"])
    flip(tmp_path / "one.bin", 5000)
    with pytest.raises(UserError, match=r"one\.bin: damaged"):
        load_pretrained(str(tmp_path / "one.bin"), causal=True)
    load_pretrained(str(tmp_path / "two.bin"), causal=True)


def test_an_adapter_is_checked_too(saved: Path, tmp_path: Path) -> None:
    model = open_language_model(str(saved)).model
    add_lora(model, LoraSection(rank=2), seed=0)
    save_lora(model, tmp_path / "adapter", base=str(saved), task="CAUSAL_LM")
    open_adapter_folder(tmp_path / "adapter")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        file = tmp_path / "adapter" / name
        flip(file, file.stat().st_size - 5)
        with pytest.raises(UserError, match=rf"{name}: damaged"):
            open_adapter_folder(tmp_path / "adapter")
        flip(file, file.stat().st_size - 5)


def test_an_export_is_checked_and_contains_no_damage(saved: Path, tmp_path: Path) -> None:
    export(str(saved), tmp_path / "out", ExportSettings(format="huggingface", check=False))
    check_manifest(tmp_path / "out")
    assert "model.safetensors" in json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]
    flip(tmp_path / "out" / "tokenizer.json", 3000)
    with pytest.raises(UserError, match=r"tokenizer\.json: damaged"):
        export(str(tmp_path / "out"), tmp_path / "again", ExportSettings(format="huggingface", check=False))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_no_model_with_weights_that_are_not_finite_is_saved(number: float, saved: Path, tmp_path: Path) -> None:
    opened = open_language_model(str(saved))
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        opened.model.get_parameter(name)[3, 5] = number
    with pytest.raises(UserError, match=rf"{name}: 1 of 2,048 numbers are not finite"):
        save_language_model(tmp_path / "model", opened.model, opened.tokenizer, opened.description)
    assert not list(tmp_path.iterdir())
    # Made by another program: neither taken for an encoder, nor exported.
    opened.model.save_pretrained(tmp_path / "other")
    opened.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=rf"{name}: 1 of 2,048 numbers are not finite"):
        LanguageModel(load_pretrained(str(tmp_path / "other"), causal=True).model)
    with pytest.raises(UserError, match=rf"{name}: 1 of 2,048 numbers are not finite"):
        export(str(tmp_path / "other"), tmp_path / "out", ExportSettings(format="huggingface", check=False))
    assert not (tmp_path / "out").exists()


def test_no_adapter_with_numbers_that_are_not_finite_is_saved(saved: Path, tmp_path: Path) -> None:
    model = open_language_model(str(saved)).model
    add_lora(model, LoraSection(rank=2), seed=0)
    with torch.no_grad():
        next(each for name, each in model.named_parameters() if ".lora_B." in name)[0, 0] = math.nan
    with pytest.raises(UserError, match=r"lora_B\.weight: 1 of \d+ numbers are not finite"):
        save_lora(model, tmp_path / "adapter", base=str(saved))


def test_files_have_the_mode_of_the_umask(pico_folder: Path, tmp_path: Path) -> None:
    opened, before = load_pretrained(str(pico_folder), causal=True), os.umask(0o027)
    try:
        save_language_model(tmp_path / "model", opened.model, opened.tokenizer, DESCRIPTION)
        save_pretrained(tmp_path / "plain", opened.model, opened.tokenizer)
    finally:
        os.umask(before)
    for folder in ("model", "plain"):
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / folder).iterdir()}
        assert len(modes) >= 6
        assert set(modes.values()) == {"0o640"}, modes


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is played by the superuser only")
def test_unreadable_weights_are_reported(pico_folder: Path) -> None:
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        folder = copied(pico_folder, Path(path) / "model")
        folder.chmod(0o755)
        config = load_pretrained(str(folder)).model.config
        (folder / "model.safetensors").chmod(0o600)
        from loopos.models.weight_files import from_folder

        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=r"model\.safetensors: not readable by this user"):
                from_folder(str(folder), config, trust_remote_code=False)
        finally:
            os.seteuid(0)


DEEP = "[" * 50_000 + "]" * 50_000


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def config(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()), **values})

    return damage


def header(change: Callable[[dict[str, Any], int], None]) -> Callable[[Path], None]:
    """A change of the header of model.safetensors; it is given the bytes of the tensors."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change(entries, len(content) - 8 - length)
        written = json.dumps(entries).encode()
        file.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])

    return damage


NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


def index(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    save_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})


def outside(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
    index(folder, {NORM: "../other.safetensors"})


def tokenizer_with(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        save_json(folder / "tokenizer.json", {**content, **values})

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "config nested deep": (text("config.json", DEEP), r"config\.json: broken: nested too deeply"),
    "config not UTF-8": (text("config.json", b'{"model_type": "\xff"}'), r"config\.json: broken: 'utf-8'"),
    "config a list": (text("config.json", "[1]"), r"config\.json: broken: not a JSON object"),
    "config empty": (text("config.json", ""), r"config\.json: broken"),
    "no head": (config(num_attention_heads=0), r"config\.json: num_attention_heads: expected a whole number from 1, got 0"),
    "heads of a text": (config(num_attention_heads="4"), r"config\.json: num_attention_heads: .* got \"4\""),
    "no size of a head": (config(head_dim=0), r"config\.json: head_dim: expected a whole number from 1, got 0"),
    "no key-value head": (config(num_key_value_heads=-1), r"num_key_value_heads: .* got -1"),
    "three key-value heads": (config(num_key_value_heads=3), "cannot load|of another shape"),
    "unknown rope": (config(rope_parameters={"rope_type": "spiral", "rope_theta": 1.0}), "spiral"),
    "rope a list": (config(rope_parameters=[1]), "rope_parameters: expected an object"),
    "rope without theta": (config(rope_parameters={"rope_type": "linear"}), "rope_theta|factor"),
    "unknown dtype": (config(dtype="float99"), r"config\.json: dtype: expected a number format .* got \"float99\""),
    "dtype a number": (config(dtype=3), r"config\.json: dtype: expected a number format"),
    "quantization a list": (config(quantization_config=[1]), r"quantization_config: expected an object, got \[1\]"),
    "many layers": (config(num_hidden_layers=100_000), r"num_hidden_layers: expected at most 1,000 layers, got 100000"),
    "more layers than tensors": (config(num_hidden_layers=900), "describes 900 layers, but its weights are 21 tensors"),
    "a huge vocabulary": (config(vocab_size=10**12), "numbers, but its weights are"),
    "a huge width": (config(intermediate_size=10**10), "numbers, but its weights are"),
    "unknown activation": (config(hidden_act="nosuch"), "nosuch"),
    "architectures a number": (config(architectures=[3]), r"architectures: expected a list of class names, got \[3\]"),
    "model_type a list": (config(model_type=["llama"]), "cannot read the config"),
    "tokenizer nested deep": (text("tokenizer.json", DEEP), r"tokenizer\.json: broken: nested too deeply"),
    "tokenizer not UTF-8": (text("tokenizer.json", b"\xff\xfe"), r"tokenizer\.json: broken"),
    "tokenizer of an unknown model": (tokenizer_with(model={"type": "Magic"}), "no tokenizer in"),
    "tokenizer with a vocabulary of texts": (tokenizer_with(model={"type": "BPE", "vocab": {"a": "b"}}), "no tokenizer in"),
    "tokenizer with broken added tokens": (tokenizer_with(added_tokens=[{"id": -1}]), "no tokenizer in"),
    "tokenizer with a broken pattern": (
        tokenizer_with(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        "no tokenizer in",
    ),
    "tokenizer config nested deep": (text("tokenizer_config.json", DEEP), "no tokenizer in .*nested too deeply"),
    "tokenizer config a list": (text("tokenizer_config.json", "[]"), "no tokenizer in"),
    "weights overlap": (
        header(lambda entries, size: entries[NORM].update(data_offsets=[0, 128])),
        r"model\.safetensors: not a complete safetensors file: .* overlaps",
    ),
    "weights end early": (
        header(lambda entries, size: entries[UP].update(data_offsets=[0, 4])),
        r"model\.safetensors: not a complete safetensors file",
    ),
    "weights of a negative shape": (
        header(lambda entries, size: entries[UP].update(shape=[-64, 32])),
        r"model\.safetensors: not a complete safetensors file",
    ),
    "weights of an unknown format": (
        header(lambda entries, size: entries[UP].update(dtype="F99")),
        r"model\.safetensors: not a complete safetensors file: .*F99",
    ),
    "a header nested deep": (
        text("model.safetensors", struct.pack("<Q", 100_000) + DEEP.encode()),
        r"model\.safetensors: not a complete safetensors file: its header is nested too deeply",
    ),
    "a header as long as memory": (
        text("model.safetensors", struct.pack("<Q", 2**60) + b"{}"),
        r"model\.safetensors: not a complete safetensors file",
    ),
    "a header not UTF-8": (
        text("model.safetensors", struct.pack("<Q", 4) + b"\xff\xff\xff\xff"),
        r"model\.safetensors: not a complete safetensors file",
    ),
    "an index to a file outside": (outside, r"index\.json: names \.\./other\.safetensors, which is outside"),
    "an index to a file that is gone": (lambda folder: index(folder, {NORM: "no.safetensors"}), "no.safetensors, named by model.safetensors.index.json, is missing"),
    "an index to a tensor that is gone": (
        lambda folder: index(folder, {"nowhere": "model-00001-of-00001.safetensors"}),
        "names the tensor nowhere, which is in no file",
    ),
    "an index nested deep": (
        lambda folder: (index(folder, {}), text("model.safetensors.index.json", DEEP)(folder))[0],
        r"index\.json: broken: nested too deeply",
    ),
    "generation config nested deep": (text("generation_config.json", DEEP), "cannot load .*nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_a_damaged_file_is_one_line(damage: str, pico_folder: Path, tmp_path: Path) -> None:
    folder = copied(pico_folder, tmp_path / "model")
    make, expected = DAMAGES[damage]
    make(folder)
    began = time.monotonic()
    with pytest.raises(UserError, match=expected) as caught:
        load_pretrained(str(folder), causal=True)
    assert time.monotonic() - began < 10
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_bare_weights_are_no_larger_than_their_file(pico_folder: Path, tmp_path: Path) -> None:
    """A file beside its config is opened the same way."""
    folder = copied(pico_folder, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    config(intermediate_size=10**10)(folder)
    with pytest.raises(UserError, match="numbers, but its weights are"):
        load_pretrained(str(folder / "weights.safetensors"), causal=True)


GGUF_CUTS = {
    "empty": lambda content: b"",
    "cut in a key": lambda content: content[:60],
    "cut in the tensors": lambda content: content[: len(content) - 5000],
    "a text longer than memory": lambda content: content[:24] + struct.pack("<Q", 2**62) + content[32:],
    "keys without end": lambda content: content[:16] + struct.pack("<Q", 2**63) + content[24:],
    "tensors without end": lambda content: content[:8] + struct.pack("<Q", 2**63) + content[16:],
    "another version": lambda content: content[:4] + struct.pack("<I", 9) + content[8:],
    "a name of another kind": lambda content: content.replace(b"llama.block_count", b"llama.block_cOunt"),
    "many layers": lambda content: content.replace(
        b"llama.block_count" + struct.pack("<II", 4, 2), b"llama.block_count" + struct.pack("<II", 4, 100_000)
    ),
    "no head": lambda content: content.replace(
        b"llama.attention.head_count" + struct.pack("<II", 4, 4), b"llama.attention.head_count" + struct.pack("<II", 4, 0)
    ),
    "a tensor beyond the end": lambda content: content.replace(b"output_norm.weight" + struct.pack("<IQ", 1, 32),
                                                               b"output_norm.weight" + struct.pack("<IQ", 1, 2**60)),
    "a tensor of an unknown type": lambda content: content.replace(b"output_norm.weight" + struct.pack("<IQI", 1, 32, 0),
                                                                   b"output_norm.weight" + struct.pack("<IQI", 1, 32, 99)),
    "text that is not UTF-8": lambda content: content.replace(b"general.architecture", b"general.architectur\xff", 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> bytes:
    pytest.importorskip("gguf")
    from test_gguf import write_gguf
    from transformers import LlamaConfig

    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        )
    )  # fmt: skip
    file = tmp_path_factory.mktemp("gguf") / "pico.gguf"
    write_gguf(file, made)
    return file.read_bytes()


@pytest.mark.parametrize("cut", GGUF_CUTS)
def test_a_damaged_gguf_is_one_line(
    cut: str, gguf_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPOS_CACHE", str(tmp_path / "cache"))
    file, content = tmp_path / "damaged.gguf", GGUF_CUTS[cut](gguf_bytes)
    assert content != gguf_bytes
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.gguf: cannot be read as GGUF: .") as caught:
        load_pretrained(str(file))
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.glob("cache/gguf/*"))


HEAD_DESCRIPTION: dict[str, Any] = {
    "format": 1, "task": "classification", "pooling": "last", "class_names": ["a", "b"], "max_length": 64,
    "precision": "fp32", "target_mean": 0.0, "target_std": 1.0, "threshold": 0.5,
    "label_space": {"task": "classification", "class_names": ["a", "b"], "keys": ["a", "b"], "label_kind": "text",
                    "num_outputs": 2, "said": ""},
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("pooling", None, "pooling: expected one of"),
        ("pooling", ..., "pooling: missing; expected one of"),
        ("precision", "fp99", "precision: expected bf16, fp16 or fp32, got \"fp99\""),
        ("precision", ..., "precision: missing"),
        ("class_names", 3, "class_names: expected a list of texts, got 3"),
        ("label_space", {}, "label_space: expected the labels as training wrote them"),
        ("label_space", ..., "label_space: missing"),
        ("max_length", 0, "max_length: expected a whole number from 1, got 0"),
        ("max_length", True, "max_length: expected a whole number from 1, got true"),
        ("threshold", "0.5", "threshold: expected a number"),
        ("target_std", [1], "target_std: expected a number"),
        ("task", "magic", "task: expected one of"),
        ("step_format", {"opening": 3}, "step_format: expected texts named"),
        ("ensemble", [], "ensemble: expected a method, members, and a weight each, got []"),
        ("ensemble", {"method": "mean", "members": [3], "weights": [1.0]}, "ensemble: expected a method"),
        ("ensemble", {"method": "mean", "members": ["a"], "weights": ["1"]}, "ensemble: expected a method"),
        ("language_ensemble", {"method": "mean", "members": ["a"]}, "language_ensemble: expected a method"),
    ],
)  # fmt: skip
def test_a_description_with_a_key_of_another_kind_is_named(key: str, value: Any, expected: str, tmp_path: Path) -> None:
    description = {**HEAD_DESCRIPTION, key: value}
    if value is ...:
        del description[key]
    (tmp_path / "head.safetensors").touch()
    save_json(tmp_path / "loopos.json", description)
    with pytest.raises(UserError) as caught:
        read_description(tmp_path)
    assert str(caught.value).splitlines()[0].startswith(f"{tmp_path / 'loopos.json'}: {expected}")


def test_a_config_of_our_own_is_checked_by_its_backbone(pico_folder: Path, tmp_path: Path) -> None:
    assert LoopOSConfig.model_type == OWN_MODEL_TYPE
    backbone = json.loads((pico_folder / "config.json").read_text())
    whole = {"model_type": OWN_MODEL_TYPE, "backbone_type": "llama", "num_hidden_layers": 0, "vocab_size": 0}
    save_json(tmp_path / "config.json", {**whole, "backbone_config": backbone})
    check_config(tmp_path / "config.json")
    save_json(tmp_path / "config.json", {**whole, "backbone_config": {**backbone, "num_attention_heads": 0}})
    with pytest.raises(UserError, match=r"backbone_config\.num_attention_heads: expected a whole number from 1, got 0"):
        check_config(tmp_path / "config.json")
    save_json(tmp_path / "config.json", whole)
    with pytest.raises(UserError, match="backbone_config, backbone_type: expected an object"):
        check_config(tmp_path / "config.json")


def test_a_whole_description_is_taken(tmp_path: Path) -> None:
    (tmp_path / "head.safetensors").touch()
    save_json(tmp_path / "loopos.json", {**HEAD_DESCRIPTION, "of_a_later_version": 1})
    assert read_description(tmp_path)["pooling"] == "last"


def test_an_old_folder_without_a_manifest_opens(pico_folder: Path) -> None:
    assert not (pico_folder / MANIFEST).exists()
    assert weight_files(pico_folder) == [pico_folder / "model.safetensors"]
    assert len(folder_tensors(pico_folder)) == len(load_file(pico_folder / "model.safetensors"))
    load_pretrained(str(pico_folder), causal=True)


def test_a_tokenizer_that_is_named_is_checked(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: each + 1 for name, each in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    # Its weights are not what is asked for.
    load_pretrained(str(saved), causal=True, tokenizer=str(folder))
    flip(folder / "tokenizer.json", 700)
    with pytest.raises(UserError, match=r"tokenizer\.json: damaged"):
        load_pretrained(str(saved), causal=True, tokenizer=str(folder))
    assert len(AutoTokenizer.from_pretrained(saved)) > 0
