"""An export is opened by the programs that it is for; one that is another model is refused, or warned about."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoTokenizer

from loopos.exporting import huggingface as hugging_face
from loopos.exporting import language_check
from loopos.exporting.checks import Check, ExportDiffers, judge
from loopos.exporting.export import Exported, export
from loopos.exporting.language_check import LlamaAnswer, LlamaStep, compared_with_llama_cpp, reference
from loopos.exporting.settings import ExportSettings

CHATML = (
    "{% for m in messages %}{{ '<bos>' + m['role'] + ': ' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant: ' }}{% endif %}"
)


def shipped(path: Path, out: Path, output_format: str = "huggingface", **named: Any) -> Exported:
    return export(str(path), out, ExportSettings(format=output_format, **named))


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
    with pytest.raises(ExportDiffers, match="the export differs from the original model") as told:
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
        ExportDiffers, match=r"tokens of the chat template, expected \d+; the first difference is at token"
    ):
        shipped(chatting, tmp_path / "out", type="f32")
    assert not (tmp_path / "out").exists()


def test_a_lossy_export_below_its_agreement_threshold_warns() -> None:
    """Its files stay; the command ends with a code of its own."""
    far, near = Check(3.0, 2.0, 0.42, texts=("greedy",)), Check(0.1, 2.0, 0.95)
    assert "q4_0 changes the model's predictions: the top prediction is the same at 42.0%" in judge(far, "q4_0", "m")
    assert judge(near, "q8_0", "m") == ""
    assert "at 68.5% of positions, expected at least 80%; use a wider" in judge(replace(far, same=0.685), "q4_0", "m")
    assert judge(replace(far, same=0.8), "q4_0", "m") == ""
    assert judge(replace(far, diagnostics=("any",)), "q8_0", "m")
    assert judge(far, "f16", "m") == ""
    with pytest.raises(ExportDiffers, match="m: the export differs from the original model"):
        judge(replace(near, diagnostics=("outputs differ",)), "f16", "m")


def test_what_llama_cpp_may_and_may_not_differ_by(chatting: Path) -> None:
    """A near tie may fall the other way; a likelier token may not be passed over, nor a turn be written otherwise."""
    own = reference(chatting, None)
    best = [LlamaStep(int(row.argmax()), float(row.max())) for row in own.logprobs]
    answer = LlamaAnswer(len(own.prompt), own.text[-1])
    assert compared_with_llama_cpp(own, best, answer, 0.01) == (
        "greedy chat text by llama.cpp: 16 of 16 tokens the same",
        [],
    )
    second = int(own.logprobs[5].topk(2).indices[1])
    gap = float(own.logprobs[5].max() - own.logprobs[5][second])
    parted = [*best]
    parted[5] = LlamaStep(second, float(own.logprobs[5][second]))
    text, diagnostics = compared_with_llama_cpp(own, parted, answer, gap * 0.9)
    assert "5 of 16" in text
    [diagnostic] = diagnostics
    assert "log-probabilities differ" in diagnostic
    assert compared_with_llama_cpp(own, parted, answer, gap * 1.1)[1] == []
    assert compared_with_llama_cpp(own, parted, answer, None)[1] == []
    [diagnostic] = compared_with_llama_cpp(own, best, replace(answer, num_prompt=3), 0.01)[1]
    assert "llama.cpp makes 3 tokens of the prompt" in diagnostic
    [diagnostic] = compared_with_llama_cpp(own, best, replace(answer, text="no"), 0.01)[1]
    assert "llama.cpp writes 'no'; expected a text that starts with" in diagnostic


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_llama_cpp_opens_a_gguf(kind: str, chatting: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    done = shipped(chatting, tmp_path / "out", "gguf", type=kind)
    assert done.check is not None
    assert any(text.startswith("greedy chat text by llama.cpp: ") for text in done.check.texts)
    if kind == "f32":
        assert done.check.diagnostics == ()


def test_llama_cpp_that_differs_is_a_diagnostic(
    chatting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(language_check, "_MESSAGES", ({"role": "user", "content": "the parcel"},))
    own = reference(chatting, None)
    monkeypatch.setattr(language_check, "reference", lambda *_, **__: own)
    monkeypatch.setattr("loopos.exporting.export.reference", lambda *_, **__: own)
    monkeypatch.setattr(language_check, "_MESSAGES", ({"role": "user", "content": "the parcel came"},))
    with pytest.raises(ExportDiffers, match=r"llama\.cpp makes \d+ tokens of the prompt"):
        shipped(chatting, tmp_path / "out", "gguf", type="f32")
    assert not (tmp_path / "out").exists()
