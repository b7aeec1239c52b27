"""What is shipped is the model: weights are found as transformers finds them, an export that differs is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import save_pico
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopos.config.faults import UserError
from loopos.config.merge import MergeConfig
from loopos.deploy.export import Exported, export
from loopos.deploy.export_settings import ExportSettings
from loopos.deploy.exporting import hugging_face, language_check
from loopos.deploy.exporting.language_check import held_against_llama, reference
from loopos.deploy.exporting.llama_cpp import LlamaAnswer, LlamaStep
from loopos.deploy.exporting.verdict import Check, ExportDiffers, judge
from loopos.deploy.merge import merge
from loopos.models.language_folder import open_language_model, save_language_model
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


def shipped(place: Path, out: Path, output_format: str = "huggingface", **named: Any) -> Exported:
    return export(str(place), out, ExportSettings(format=output_format, **named))


def merged(place: Path, out: Path) -> Path:
    models = [{"model": str(place)}, {"model": str(place)}]
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
def test_a_whole_file_goes_before_a_stale_index(gone: bool, shards: Path, tmp_path: Path, pico_tokenizer: Path) -> None:
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


def test_the_file_that_a_config_names_goes_first(pico_folder: Path, tmp_path: Path) -> None:
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
        (_outside, r"names \.\./outside\.safetensors, which is outside of the folder"),
        (_overlapping, "overlaps|belong to no tensor|cannot load|InvalidOffset"),
        (_not_named, "no weight_map of tensors' files"),
        (_nested, "broken: nested too deeply"),
    ],
)
def test_an_index_that_lies_is_told(spoil: Callable[[Path], None], message: str, shards: Path, tmp_path: Path) -> None:
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


def test_bytes_that_belong_to_no_tensor_are_told(pico_folder: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("output_format", "kind"), [("huggingface", "f16"), ("huggingface", "bf16"), ("gguf", "bf16")])
def test_a_narrower_format_is_the_rounded_model_exactly(
    output_format: str, kind: str, chatting: Path, tmp_path: Path
) -> None:
    if output_format == "gguf":
        pytest.importorskip("gguf")
    done = shipped(chatting, tmp_path / "out", output_format, type=kind)
    assert done.check is not None
    assert 0 < done.check.largest < 0.05
    assert done.check.beyond is not None
    assert done.check.beyond < 1e-5
    program = "LoopOS" if output_format == "gguf" else "transformers"
    assert f"greedy chat text by {program}: 16 of 16 tokens the same" in done.check.texts


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


def spoiled(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, Tensor], Tensor]) -> None:
    """What an export writes is not what it read."""
    honest = hugging_face.cast
    monkeypatch.setattr(hugging_face, "cast", lambda name, tensor, dtype: honest(name, change(name, tensor), dtype))


def test_an_exact_export_that_differs_leaves_nothing(
    chatting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(name: str, tensor: Tensor) -> Tensor:
        return tensor + 0.02 if name.endswith("0.mlp.up_proj.weight") else tensor

    spoiled(monkeypatch, change)
    with pytest.raises(ExportDiffers, match="another model than the one it was made from") as told:
        shipped(chatting, tmp_path / "out", type="f32")
    assert told.value.exit_code == 1
    assert "outputs differ by up to" in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["chatting"]
    shipped(chatting, tmp_path / "out", type="f32", check=False)


def test_an_export_with_another_template_leaves_nothing(
    chatting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal weights do not make equal answers."""
    written = hugging_face.write_hugging_face

    def other(folder: Path, out: Path, *rest: Any) -> None:
        written(folder, out, *rest)
        (out / "chat_template.jinja").write_text(CHATML.replace("role'] + ': '", "role'] + ' '"))

    monkeypatch.setattr(hugging_face, "write_hugging_face", other)
    with pytest.raises(
        ExportDiffers, match=r"tokens of the chat template, expected \d+; the first other one is number"
    ):
        shipped(chatting, tmp_path / "out", type="f32")
    assert not (tmp_path / "out").exists()


def test_a_lossy_export_below_its_share_warns() -> None:
    """Its files stay; the command ends with a code of its own."""
    far, near = Check(3.0, 2.0, 0.42, texts=("greedy",)), Check(0.1, 2.0, 0.95)
    assert "q4_0 says other things than the model: the likeliest token is the same in 42.0%" in judge(far, "q4_0", "m")
    assert judge(near, "q8_0", "m") == ""
    assert judge(replace(far, faults=("any",)), "q8_0", "m")
    assert judge(far, "f16", "m") == ""
    with pytest.raises(ExportDiffers, match="m: the export is another model"):
        judge(replace(near, faults=("outputs differ",)), "f16", "m")


def test_what_llama_cpp_may_and_may_not_differ_by(chatting: Path) -> None:
    """A near tie may fall the other way; a likelier token may not be passed over, nor a turn be written otherwise."""
    own = reference(chatting, None)
    best = [LlamaStep(int(row.argmax()), float(row.max())) for row in own.logprobs]
    answer = LlamaAnswer(len(own.prompt), own.text[-1])
    assert held_against_llama(own, best, answer, 0.01) == (
        "greedy chat text by llama.cpp: 16 of 16 tokens the same",
        [],
    )
    second = int(own.logprobs[5].topk(2).indices[1])
    gap = float(own.logprobs[5].max() - own.logprobs[5][second])
    parted = [*best]
    parted[5] = LlamaStep(second, float(own.logprobs[5][second]))
    text, faults = held_against_llama(own, parted, answer, gap * 0.9)
    assert "5 of 16" in text
    [fault] = faults
    assert "log-probabilities differ" in fault
    assert held_against_llama(own, parted, answer, gap * 1.1)[1] == []
    assert held_against_llama(own, parted, answer, None)[1] == []
    [fault] = held_against_llama(own, best, replace(answer, num_prompt=3), 0.01)[1]
    assert "llama.cpp makes 3 tokens of the prompt" in fault
    [fault] = held_against_llama(own, best, replace(answer, text="no"), 0.01)[1]
    assert "llama.cpp writes 'no'; expected a text that begins with" in fault


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_llama_cpp_opens_a_gguf(kind: str, chatting: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    done = shipped(chatting, tmp_path / "out", "gguf", type=kind)
    assert done.check is not None
    assert any(text.startswith("greedy chat text by llama.cpp: ") for text in done.check.texts)
    if kind == "f32":
        assert done.check.faults == ()


def test_llama_cpp_that_differs_is_a_fault(chatting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(language_check, "_MESSAGES", ({"role": "user", "content": "the parcel"},))
    own = reference(chatting, None)
    monkeypatch.setattr(language_check, "reference", lambda *_, **__: own)
    monkeypatch.setattr("loopos.deploy.export.reference", lambda *_, **__: own)
    monkeypatch.setattr(language_check, "_MESSAGES", ({"role": "user", "content": "the parcel came"},))
    with pytest.raises(ExportDiffers, match=r"llama\.cpp makes \d+ tokens of the prompt"):
        shipped(chatting, tmp_path / "out", "gguf", type="f32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_neither_shipped_nor_saved(bad: float, pico_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(pico_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told = r"model\.layers\.1\.mlp\.up_proj\.weight: .*not finite"
    for output_format, kind in (("huggingface", None), ("huggingface", "bf16"), ("gguf", "f16"), ("gguf", "q8_0")):
        with pytest.raises(UserError, match=told):
            shipped(folder, tmp_path / "out", output_format, type=kind, check=False)
    with pytest.raises(UserError, match=told):
        merged(folder, tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UserError, match=told):
        save_language_model(tmp_path / "out", model, tokenizer, {"precision": "fp32", "stop_tokens": [2]})
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
