"""A GGUF file holds the model that it was made from: read back by transformers, by the project, and tensor by tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from pico_runs import slow_but
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

from loopos.config.diagnostics import UserError
from loopos.exporting.export import Exported, export
from loopos.exporting.gguf import CONTROL, UNUSED, encoded, interleaved, read_vocabulary
from loopos.exporting.settings import ExportSettings
from loopos.models.load import load_pretrained

gguf = pytest.importorskip("gguf")
TEXT = "the parcel came late and the box was open 17"
TINY: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.1,
}  # fmt: skip


def made(source: Path | str, out: Path, kind: str, *, check: bool = False) -> Exported:
    return export(str(source), out, ExportSettings(format="gguf", type=kind, check=check))


def saved(config: Any, folder: Path, tokenizer: Path) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder: Path, **named: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **named).eval()
    found: torch.Tensor = model(input_ids=torch.arange(3, 40)[None]).logits
    return found


def the_file(exported: Exported) -> Path:
    [file] = exported.folder.glob("*.gguf")
    return file


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize(
    ("kind", "allowed"),
    slow_but(
        [("f32", 1e-5), ("q8_0", 0.1), ("q4_0", 1.0)],
        [("f32", 1e-5), ("f16", 5e-3), ("bf16", 5e-2), ("q8_0", 0.1), ("q4_0", 1.0)],
    ),
)
def test_transformers_reads_back_the_logits(kind: str, allowed: float, pico_folder: Path, tmp_path: Path) -> None:
    exported = made(pico_folder, tmp_path / "out", kind, check=True)
    file = the_file(exported)
    assert file.name == f"out-{kind.upper()}.gguf"
    expected = logits(pico_folder)
    difference = float((logits(file.parent, gguf_file=file.name) - expected).abs().max())
    assert difference <= allowed
    assert kind == "f32" or difference > 0
    assert exported.check is not None
    assert exported.check.largest <= allowed
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert tokenizer(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(pico_folder)(TEXT)["input_ids"]


def test_the_projects_own_reader_opens_it(pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPOS_CACHE", str(tmp_path / "cache"))

    def named_by_gpt2(described: dict[str, Any]) -> None:
        # transformers' reader puts this token into every byte-level vocabulary that lacks it.
        described["model"]["vocab"]["<|endoftext|>"] = described["model"]["vocab"].pop("<pad>")
        described["added_tokens"][0]["content"] = "<|endoftext|>"

    folder = with_tokenizer(pico_folder, tmp_path / "model", named_by_gpt2)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|endoftext|>"}))
    opened = load_pretrained(str(the_file(made(folder, tmp_path / "out", "f32"))), causal=True)
    original = load_pretrained(str(folder), causal=True)
    parameters, expected = dict(opened.model.named_parameters()), dict(original.model.named_parameters())
    assert set(parameters) == set(expected)
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert opened.tokenizer(TEXT)["input_ids"] == original.tokenizer(TEXT)["input_ids"]


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_logits_are_those_of_the_dequantised_weights(kind: str, pico_folder: Path, tmp_path: Path) -> None:
    """The weights that the file's numbers stand for, put into the model by hand, give the logits that are read."""
    file = the_file(made(pico_folder, tmp_path / "out", kind))
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    model = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32).eval()
    heads = {"attn_q": 4, "attn_k": 2}
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        parts = name.removesuffix(".weight").split(".")
        if "layers" in parts:
            short = names[".".join(parts[3:])]
            target = f"blk.{parts[2]}.{short}.weight"
        else:
            short = ""
            target = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[-1]] + ".weight"
        values = torch.from_numpy(gguf.dequantize(read[target].data, read[target].tensor_type).copy())
        if short in heads:
            # Rows of a head by pairs → first halves, then second halves.
            values = torch.cat([part[half::2] for part in values.chunk(heads[short]) for half in (0, 1)])
        parameter.data = values.reshape(parameter.shape)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 40)[None]).logits
    torch.testing.assert_close(logits(file.parent, gguf_file=file.name), expected, atol=1e-5, rtol=1e-5)
    types = {tensor.tensor_type.name for tensor in read.values()}
    assert types == ({"Q8_0", "F32"} if kind == "q8_0" else {"Q4_0", "Q8_0", "F32"})
    assert read["token_embd.weight"].tensor_type.name == "Q8_0"
    assert read["output_norm.weight"].tensor_type.name == "F32"


def test_rows_of_a_head_go_by_pairs() -> None:
    rows = torch.arange(8)[:, None]
    # Two heads of size 4: the pairs of a head are (0, 2) and (1, 3).
    assert interleaved(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_block_of_8_bits_by_hand() -> None:
    values = torch.zeros(1, 32)
    values[0, :3] = torch.tensor([127.0, -63.4, 1.0])
    block = encoded("w", values, "q8_0")
    assert block.shape == (1, 34)
    # A scale of 127 / 127 in f16, then whole numbers.
    assert block[0, :2].view(numpy.float16)[0] == 1.0
    assert block[0, 2:5].view(numpy.int8).tolist() == [127, -63, 1]


def test_a_block_of_4_bits_by_hand() -> None:
    values = torch.zeros(1, 32)
    values[0, 0], values[0, 1], values[0, 16] = -8.0, 3.0, 7.0
    block = encoded("w", values, "q4_0")
    assert block.shape == (1, 18)
    # The largest number, -8, takes the code 0; the scale is -8 / -8; a byte holds number i low and number i + 16 high.
    assert block[0, :2].view(numpy.float16)[0] == 1.0
    assert block[0, 2] == 0 | (7 + 8) << 4
    assert block[0, 3] == (3 + 8) | 8 << 4


def test_metadata_is_what_llama_cpp_reads(pico_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    fields = fields_of(the_file(made(folder, tmp_path / "out", "f16")))
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == 1
    expected = {
        "block_count": 2, "context_length": 256, "embedding_length": 32, "feed_forward_length": 64, "vocab_size": 400,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8, "rope.freq_base": 10000.0,
    }  # fmt: skip
    assert {name: fields[f"llama.{name}"] for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.eot_token_id"] == 5
    assert fields["tokenizer.ggml.padding_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert len(fields["tokenizer.ggml.tokens"]) == 400
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert len(fields["tokenizer.ggml.merges"]) > 10


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY, tie_word_embeddings=True),
        LlamaConfig(**TINY, head_dim=16),
        # transformers gives the tokenizer of every Qwen2 the token <|endoftext|>.
        Qwen2Config(**{**TINY, "vocab_size": 401}),
        # transformers' own reader of GGUF takes the size of a Qwen3's heads for 128.
        Qwen3Config(**TINY, head_dim=128),
        Qwen3Config(**TINY, head_dim=8),
    ],
    ids=["llama tied", "llama wide heads", "qwen2", "qwen3", "qwen3 narrow heads"],
)
def test_other_models_of_the_family(config: Any, tmp_path: Path, pico_tokenizer: Path) -> None:
    folder = saved(config, tmp_path / "model", pico_tokenizer)
    exported = made(folder, tmp_path / "out", "f32", check=True)
    assert exported.check is not None
    assert exported.check.largest <= 1e-5
    assert exported.check.same == 1.0


def test_mistral_is_written_as_the_llama_that_it_is(tmp_path: Path, pico_tokenizer: Path) -> None:
    from transformers import MistralConfig

    folder = saved(MistralConfig(**TINY, sliding_window=None), tmp_path / "model", pico_tokenizer)
    exported = made(folder, tmp_path / "out", "f32", check=True)
    assert exported.check is not None
    assert exported.check.largest <= 1e-5
    assert fields_of(the_file(exported))["general.architecture"] == "llama"


def refused(location: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        made(location, tmp_path / "refused", "f16")
    assert not [path for path in tmp_path.iterdir() if "refused" in path.name]
    return str(caught.value)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path, pico_tokenizer: Path) -> None:
    from transformers import GPT2Config, MistralConfig

    gpt2 = GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    assert "architecture gpt2 cannot be exported" in refused(saved(gpt2, tmp_path / "gpt2", pico_tokenizer), tmp_path)
    scaled = LlamaConfig(**TINY, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    assert "rope_type linear" in refused(saved(scaled, tmp_path / "scaled", pico_tokenizer), tmp_path)
    biased = LlamaConfig(**TINY, attention_bias=True)
    assert "biases" in refused(saved(biased, tmp_path / "biased", pico_tokenizer), tmp_path)
    sliding = MistralConfig(**TINY, sliding_window=16)
    assert "slides over 16" in refused(saved(sliding, tmp_path / "sliding", pico_tokenizer), tmp_path)


def with_tokenizer(pico_folder: Path, folder: Path, change: Any) -> Path:
    """The pico model with a tokenizer.json that `change` has altered."""
    shutil.copytree(pico_folder, folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    change(described)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


def digits_apart(described: dict[str, Any]) -> None:
    steps = [{"type": "Digits", "individual_digits": True}, described["pre_tokenizer"]]
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def test_the_pre_tokenizer_is_found_by_what_it_does(pico_folder: Path, tmp_path: Path) -> None:
    assert read_vocabulary(pico_folder, 400, "x").pre == "gpt-2"
    assert read_vocabulary(with_tokenizer(pico_folder, tmp_path / "s", digits_apart), 400, "x").pre == "smollm"

    def split(described: dict[str, Any], digits: str) -> None:
        pattern = (
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" + digits
            + "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
        )  # fmt: skip
        first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        steps = [first, {**described["pre_tokenizer"], "use_regex": False}]
        described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}

    def qwen(described: dict[str, Any]) -> None:
        split(described, "\\p{N}")
        described["normalizer"] = {"type": "NFC"}

    def llama(described: dict[str, Any]) -> None:
        split(described, "\\p{N}{1,3}")
        described["model"]["ignore_merges"] = True

    assert read_vocabulary(with_tokenizer(pico_folder, tmp_path / "q", qwen), 400, "x").pre == "qwen2"
    assert read_vocabulary(with_tokenizer(pico_folder, tmp_path / "l", llama), 400, "x").pre == "llama-bpe"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "space before the first word"),
        (lambda d: d["model"].update(byte_fallback=True), "SentencePiece"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda d: d["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "byte-level"),
        (lambda d: d["added_tokens"][0].update(lstrip=True), "strips spaces"),
    ],
)
def test_a_tokenizer_without_a_name_is_refused(change: Any, told: str, pico_folder: Path, tmp_path: Path) -> None:
    assert told in refused(with_tokenizer(pico_folder, tmp_path / "model", change), tmp_path)


def test_rows_beyond_the_vocabulary_have_names(pico_folder: Path) -> None:
    vocabulary = read_vocabulary(pico_folder, 403, "x")
    size = len(AutoTokenizer.from_pretrained(pico_folder))
    assert list(vocabulary.tokens[size:403]) == [f"[PAD{i}]" for i in range(size, 403)]
    assert set(vocabulary.types[size:]) == {UNUSED}
    assert vocabulary.types[1] == CONTROL
    with pytest.raises(UserError, match="its embedding 100 rows"):
        read_vocabulary(pico_folder, 100, "x")


def test_rows_that_fill_no_block_stay_f16(tmp_path: Path, pico_tokenizer: Path) -> None:
    config = LlamaConfig(**{**TINY, "hidden_size": 48, "intermediate_size": 64})
    folder = saved(config, tmp_path / "model", pico_tokenizer)
    exported = made(folder, tmp_path / "out", "q8_0", check=True)
    read = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(the_file(exported)).tensors}
    assert read["blk.0.ffn_up.weight"] == "F16"
    assert read["blk.0.ffn_down.weight"] == "Q8_0"
    assert any("F16" in note for note in exported.notes)


def test_numbers_that_f16_cannot_hold_are_refused(pico_folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(pico_folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(pico_folder).save_pretrained(tmp_path / "model")
    assert "too large for f16" in refused(tmp_path / "model", tmp_path)
