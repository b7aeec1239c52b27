"""A GGUF file opens as the model that it was written from, is converted once, and is refused if broken."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from killed_runs import in_a_child
from pico_runs import hidden_states
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from loopos.config.diagnostics import UserError
from loopos.models import gguf
from loopos.models.load import Pretrained, load_config, load_pretrained


def write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """A Llama in F32 with a byte-level vocabulary, as llama.cpp would write it."""
    import gguf as library
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config = model.config
    writer = library.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<|endoftext|>", "<eos>", *bytes_to_unicode().values(), "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 257])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inside = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            target = f"blk.{layer}.{inside[rest]}"
            if inside[rest] in ("attn_q", "attn_k"):
                # llama.cpp interleaves the two halves of each head's rotary features.
                heads = config.num_attention_heads if inside[rest] == "attn_q" else config.num_key_value_heads
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        else:
            target = names[stem]
        writer.add_tensor(f"{target}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A GGUF file, and the hidden states of the model that it was written from."""
    pytest.importorskip("gguf")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, rms_norm_eps=1e-6,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    file = tmp_path_factory.mktemp("gguf") / "pico.gguf"
    write_gguf(file, model)
    return file, hidden_states(model.model)


def test_a_gguf_file_opens_and_is_converted_once(
    gguf_file: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, expected = gguf_file
    monkeypatch.setenv("LOOPOS_CACHE", str(tmp_path / "cache"))
    opened: Pretrained = load_pretrained(str(file))
    torch.testing.assert_close(hidden_states(opened.model), expected, atol=1e-5, rtol=1e-5)
    assert opened.tokenizer.decode(opened.tokenizer("good value")["input_ids"]) == "good value"
    assert load_config(str(file)).hidden_size == 32
    folders = list((tmp_path / "cache" / "gguf").iterdir())
    assert len(folders) == 1
    assert isinstance(AutoModel.from_pretrained(folders[0]), nn.Module)

    def refuse(*arguments: object) -> None:
        raise AssertionError("converted a second time")

    monkeypatch.setattr(gguf, "convert", refuse)
    load_pretrained(str(file))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_what_a_killed_conversion_left_goes(
    gguf_file: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = gguf_file[0], tmp_path / "cache" / "gguf"
    monkeypatch.setenv("LOOPOS_CACHE", str(tmp_path / "cache"))
    convert = gguf.convert

    def die(source: Path, folder: Path) -> None:
        convert(source, folder)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(gguf, "convert", die)
    assert in_a_child(lambda: gguf.converted_folder(file), None) == -signal.SIGKILL
    [left] = cache.iterdir()
    assert left.name.startswith(".")
    assert (left / "model.safetensors").is_file()
    monkeypatch.setattr(gguf, "convert", convert)
    folder = gguf.converted_folder(file)
    assert list(cache.iterdir()) == [folder]


def test_a_broken_gguf_file_is_refused_and_leaves_nothing(
    gguf_file: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPOS_CACHE", str(tmp_path / "cache"))
    content = gguf_file[0].read_bytes()
    for name, broken in (("cut", content[: len(content) // 2]), ("empty", b""), ("other", b"no gguf at all" * 50)):
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(broken)
        with pytest.raises(UserError, match=f"{name}.gguf: cannot be read as GGUF"):
            load_pretrained(str(file))
    assert not list((tmp_path / "cache" / "gguf").iterdir())
