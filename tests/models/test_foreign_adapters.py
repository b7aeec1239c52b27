"""Adapters of every kind that peft wrote: opened as a model they equal peft's outputs, or are refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_runs import slow_but
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from loopos.config.diagnostics import UserError
from loopos.config.merge import MergeConfig
from loopos.exporting.export import export
from loopos.exporting.settings import ExportSettings
from loopos.merging.merge import merge
from loopos.models.folders import open_language_model
from loopos.models.load import load_pretrained

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[3, 390, 17, 8, 250, 395, 44, 399, 5, 120]])
ADDED = torch.tensor([[3, 400, 17, 401, 250]])
LINEAR = ["q_proj", "v_proj", "up_proj"]


def lora(**named: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": LINEAR, **named}


KINDS: dict[str, dict[str, Any]] = {
    "plain": lora(),
    "rslora": lora(use_rslora=True),
    "patterns": lora(rank_pattern={"layers.0.*q_proj": 2, "v_proj": 6}, alpha_pattern={"^model.layers.1.*q_proj": 3, "up_proj": 20}),
    "target pattern": lora(target_modules=r".*layers\.1\..*(q|k)_proj"),
    "layers_to_transform": lora(layers_to_transform=[1]),
    "excluded": lora(exclude_modules=["model.layers.0.self_attn.q_proj"]),
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "pissa with rslora": lora(init_lora_weights="pissa", use_rslora=True),
    "olora": lora(init_lora_weights="olora"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "bias": lora(bias="all", target_modules=["q_proj"]),
    "lora_only": lora(bias="lora_only", target_modules=["q_proj"]),
    "lora_bias": lora(lora_bias=True, target_modules=["q_proj"]),
    "norms": lora(modules_to_save=["norm"]),
    "head": lora(modules_to_save=["lm_head"]),
    "embeddings": lora(modules_to_save=["embed_tokens"]),
    "embeddings and head": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "lora on embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "lora on the head": lora(target_modules=["lm_head", "q_proj"]),
    "trainable tokens": lora(trainable_token_indices=[3, 8, 399]),
    "tokens of two": lora(trainable_token_indices={"embed_tokens": [3, 8]}),
    "parameters": lora(target_modules=None, target_parameters=["mlp.up_proj.weight"]),
    "replicated layers": lora(layer_replication=[[0, 2], [1, 2]]),
    "adalora": {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 9, "target_modules": LINEAR},
    "ia3": {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "loha": {"peft_type": "LOHA", "r": 4, "alpha": 8, "target_modules": LINEAR},
    "lokr": {"peft_type": "LOKR", "r": 2, "alpha": 8, "target_modules": LINEAR},
    "vera": {"peft_type": "VERA", "r": 8, "target_modules": ["q_proj", "o_proj"]},
    "oft": {"peft_type": "OFT", "oft_block_size": 8, "r": 0, "target_modules": LINEAR},
    "boft": {"peft_type": "BOFT", "boft_block_size": 8, "target_modules": ["q_proj"]},
    "hra": {"peft_type": "HRA", "r": 4, "target_modules": LINEAR},
    "fourierft": {"peft_type": "FOURIERFT", "n_frequency": 20, "target_modules": LINEAR},
    "miss": {"peft_type": "MISS", "r": 4, "target_modules": ["q_proj"]},
    "ln_tuning": {"peft_type": "LN_TUNING", "target_modules": ["norm", "input_layernorm"]},
    "tokens only": {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed_tokens"], "token_indices": [3, 8]},
}  # fmt: skip


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """A pico Llama with biases in its attention, with an output embedding of its own or the input's."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    model = AutoModelForCausalLM.from_pretrained(pico_folder)
    config = model.config
    config.tie_word_embeddings, config.attention_bias = request.param == "tied", True
    torch.manual_seed(5)
    made = type(model)(config)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(pico_folder).save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, *, rows: int | None = None, task: str | None = "CAUSAL_LM", **named: Any) -> Path:
    """An adapter that training has changed, saved by peft."""
    from peft import PeftConfig, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    torch.manual_seed(1)
    kind: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[named.pop("peft_type")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapted = get_peft_model(model, kind(task_type=task, **named), autocast_adapter_dtype=False)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.08 * torch.randn(parameter.shape)
        adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def under_peft(base: Path, folder: Path, ids: Tensor = IDS, rows: int | None = None) -> Tensor:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        found: Tensor = PeftModel.from_pretrained(model, str(folder)).eval()(input_ids=ids).logits
    return found


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model.eval()(input_ids=ids).logits
    return found


def opened(folder: Path) -> PreTrainedModel:
    """As transformers opens it, with no weight missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


def merged(models: list[Path], out: Path, **named: Any) -> Path:
    recipe = {"method": "linear", "models": [{"model": str(each)} for each in models], "output_dir": str(out)}
    merge(MergeConfig.model_validate({**recipe, **named}))
    return out


def saved(model: PreTrainedModel, out: Path) -> Path:
    model.save_pretrained(out)
    return out


# What ties concern is tried with them, the rest without, and all with both by the slow tests.
TIES = ("head", "embeddings", "lora on the head", "trainable tokens")
RARE = ("replicated layers", "rslora", "patterns", "target pattern", "layers_to_transform", "olora", "bias", "lora_bias", "loha", "lokr", "vera",
        "adalora", "embeddings and head", "lora on embeddings", "excluded", "orthogonal", "pissa with rslora", "tokens of two", "norms", "lora_only", "parameters", "oft", "boft", "hra",
        "fourierft", "miss", "ln_tuning", "tokens only")  # fmt: skip
ALL = [(name, kind) for name in ("untied", "tied") for kind in KINDS]
CASES = slow_but(
    [each for each in ALL if each[1] not in RARE and each[0] == ("tied" if each[1] in TIES else "untied")], ALL
)


@pytest.mark.parametrize(("base", "kind"), CASES, indirect=["base"])
def test_an_adapter_answers_as_under_peft(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", **KINDS[kind])
    expected = under_peft(base, adapter)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.02
    folded = load_pretrained(str(adapter), causal=True).model
    assert all(parameter.requires_grad for parameter in folded.parameters())
    torch.testing.assert_close(logits(folded), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(opened(merged([adapter], tmp_path / "out"))), expected, atol=1e-4, rtol=1e-4)


def refused(path: Path, message: str, **named: Any) -> None:
    """One line, without a traceback, by every command that opens a model."""
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(str(path), causal=True)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 600


def rewritten(adapter: Path, folder: Path, **changes: Any) -> Path:
    """A copy of an adapter with changes in its config."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    return trained(pico_folder, tmp_path_factory.mktemp("plain") / "adapter", **lora())


@pytest.mark.parametrize(
    ("peft_type", "named"),
    [
        ("PROMPT_TUNING", {"num_virtual_tokens": 3}),
        ("PREFIX_TUNING", {"num_virtual_tokens": 3}),
        ("P_TUNING", {"num_virtual_tokens": 3}),
        ("ADAPTION_PROMPT", {"adapter_len": 4, "adapter_layers": 2}),
    ],
)
def test_an_adapter_that_no_weights_can_hold_is_refused(
    peft_type: str, named: dict[str, Any], pico_folder: Path, tmp_path: Path
) -> None:
    target = trained(pico_folder, tmp_path / "adapter", peft_type=peft_type, **named)
    refused(target, f"an adapter of peft_type {peft_type}.*")
    with pytest.raises(UserError, match=peft_type):
        merged([target], tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4: its change begins at a start"),
        ({"init_lora_weights": "corda"}, "init_lora_weights corda"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights lora_ga"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights loftq that cannot be put"),
        ({"alora_invocation_tokens": [3, 4]}, "an activated LoRA"),
        ({"use_magic": True}, "use_magic: no setting of LORA that peft"),
        ({"task_type": "SEQ_CLS"}, "an adapter of task SEQ_CLS"),
        ({"task_type": "FEATURE_EXTRACTION"}, "cannot generate text"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"peft_type": "LORA2"}, "peft_type: got LORA2; expected one that peft"),
        ({"peft_type": 7}, "peft_type: expected the name of a method, such as LORA, got 7"),
        ({"r": 0}, "r: expected a whole number from 1, got 0"),
        ({"r": 8}, "r: got 8 for .*_proj; expected 4, the rank of its weights"),
        ({"r": 10**9}, "r: got 1000000000 for"),
        ({"r": "4"}, 'r: expected a whole number from 1, got "4"'),
        ({"lora_alpha": None}, "lora_alpha: expected a number, got null"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected a number, got Infinity"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: expected names and a number for each"),
        ({"alpha_pattern": [1]}, "alpha_pattern: expected names and a number for each"),
        ({"alpha_pattern": {"(q_proj": 4}}, r"alpha_pattern: expected a regular expression, got '\(q_proj'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: expected names and a whole number"),
        ({"rank_pattern": {"q_proj": 2}}, "r: got 2 for .*q_proj; expected 4"),
        ({"target_modules": 5}, "target_modules: expected a text or a list of texts"),
        ({"target_modules": ["q_proj"]}, "cannot be put into .*: it contains .*which the model does not have"),
        ({"target_modules": ["query"]}, "cannot be put into"),
        ({"layers_to_transform": "1"}, "layers_to_transform: expected a whole number or a list of them"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication: expected a list of ranges"),
        ({"layer_replication": [[0, 9]]}, "cannot be put into"),
        ({"modules_to_save": ["lm_head"]}, "cannot be put into"),
        ({"trainable_token_indices": [4000]}, "cannot be put into"),
        ({"bias": "some"}, "bias: expected none, all or lora_only"),
    ],
)  # fmt: skip
def test_an_invalid_config_is_reported(changes: dict[str, Any], message: str, plain: Path, tmp_path: Path) -> None:
    refused(rewritten(plain, tmp_path / "adapter", **changes), message)


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern", "target_modules", "exclude_modules"])
def test_a_regular_expression_without_end_is_ended(
    key: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`(\\w+)+!` tries every way to cut a name before it finds that none ends in a bang."""
    monkeypatch.setattr("loopos.models.adapter_folder.TIME_LIMIT", 0.3)
    bomb = r"(\w+\.?)+!"
    value = {bomb: 4} if key.endswith("pattern") else bomb
    target = rewritten(plain, tmp_path / "adapter", **{key: value})
    refused(target, rf"{key}: .* takes over 0\.3 seconds to match")
    if key == "alpha_pattern":
        with pytest.raises(UserError, match="seconds to match"):
            merged([target], tmp_path / "out")


def test_broken_weights_of_an_adapter_are_reported(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_A" in name)
    for number, (change, message) in enumerate(
        [
            ({first: torch.zeros(4, 7)}, "size mismatch|of another model"),
            ({first: torch.zeros(4)}, "cannot be put into|the tensor"),
            ({first: torch.full((4, 32), float("nan"))}, "NaNs detected|otherwise than beside it"),
            ({"base_model.model.other.lora_A.weight": torch.zeros(4, 4)}, "does not have|one of its two"),
        ]
    ):
        target = tmp_path / str(number)
        shutil.copytree(plain, target)
        save_file({**tensors, **change}, target / "adapter_model.safetensors")
        refused(target, message)
    (target / "adapter_model.safetensors").unlink()
    refused(target, "no adapter_model.safetensors; expected an adapter saved as safetensors")


def test_biases_that_the_layers_lack_are_refused_by_name(pico_folder: Path, tmp_path: Path) -> None:
    refused(trained(pico_folder, tmp_path / "adapter", **lora(lora_bias=True)), "with lora_bias that cannot be merged")


@pytest.mark.parametrize(
    ("base", "targets"),
    slow_but(
        ("tied", ["q_proj"]),
        [("untied", ["q_proj"]), ("tied", ["q_proj"]), ("untied", ["q_proj", "embed_tokens", "lm_head"])],
    ),
    indirect=["base"],
)
def test_a_larger_vocabulary_comes_with_the_adapter(base: Path, tmp_path: Path, targets: list[str]) -> None:
    """Two tokens more, whose rows training has saved; and their tokenizer."""
    adapter = trained(base, tmp_path / "adapter", rows=402, **lora(target_modules=targets))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(adapter)
    expected = under_peft(base, adapter, ADDED, rows=402)
    assert exported(adapter, tmp_path / "out") == ""
    torch.testing.assert_close(logits(opened(tmp_path / "out"), ADDED), expected, atol=1e-4, rtol=1e-4)
    assert open_language_model(str(tmp_path / "out")).tokenizer("<two>")["input_ids"] == [401]
    found = opened(merged([adapter], tmp_path / "merged"))
    torch.testing.assert_close(logits(found, ADDED), expected, atol=1e-4, rtol=1e-4)


def exported(path: Path, out: Path, kind: str = "huggingface") -> str:
    result = export(str(path), out, ExportSettings(format=kind))
    assert result.check is not None
    assert result.check.diagnostics == ()
    return result.warning


def test_a_tokenizer_with_tokens_that_the_adapter_did_not_save_is_refused(plain: Path, tmp_path: Path) -> None:
    target = rewritten(plain, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(
        json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(target)
    refused(
        target, "its tokenizer has 402 tokens, but the model only 400 embeddings: those of <one>, <two> were not saved"
    )


@pytest.mark.parametrize(
    ("base", "kind"),
    slow_but(("tied", "head"), [("tied", "head"), ("untied", "head"), ("tied", "pissa")]),
    indirect=["base"],
)
def test_an_export_answers_as_under_peft(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", **KINDS[kind])
    assert exported(adapter, tmp_path / "out") == ""
    torch.testing.assert_close(logits(opened(tmp_path / "out")), under_peft(base, adapter), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", slow_but("head", ["head", "lora on embeddings"]))
def test_a_gguf_of_an_adapter_answers_as_under_peft(kind: str, tied_folder: Path, tmp_path: Path) -> None:
    """Of a model whose tied embeddings the adapter has made two."""
    pytest.importorskip("gguf")
    adapter = trained(tied_folder, tmp_path / "adapter", **KINDS[kind])
    result = export(str(adapter), tmp_path / "out", ExportSettings(format="gguf", type="f32"))
    assert result.check is not None
    found = load_pretrained(str(tmp_path / "out" / "out-F32.gguf"), causal=True).model
    torch.testing.assert_close(logits(found), under_peft(tied_folder, adapter), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "base"
    model = AutoModelForCausalLM.from_pretrained(pico_folder, tie_word_embeddings=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(pico_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base", ["untied"], indirect=True)
def test_an_adapter_over_an_adapter_is_both(base: Path, plain: Path, tmp_path: Path) -> None:
    """A cycle of adapters is reported."""
    one = trained(base, tmp_path / "one", **lora())
    merged_once = saved(load_pretrained(str(one), causal=True).model, tmp_path / "under")
    AutoTokenizer.from_pretrained(base).save_pretrained(merged_once)
    two = trained(merged_once, tmp_path / "two", **lora(use_rslora=True))
    expected = under_peft(merged_once, two)
    chained = rewritten(two, tmp_path / "chained", base_model_name_or_path=str(one))
    torch.testing.assert_close(logits(load_pretrained(str(chained), causal=True).model), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(opened(merged([chained], tmp_path / "out"))), expected, atol=1e-4, rtol=1e-4)
    around = rewritten(one, tmp_path / "around", base_model_name_or_path=str(tmp_path / "around"))
    refused(around, "leads back to the adapter itself")


def test_summed_adapters_change_what_each_changes(pico_folder: Path, tmp_path: Path) -> None:
    """Of other layers, ranks and scales; the reference is peft's own sum of the two."""
    from peft import PeftModel

    one = trained(pico_folder, tmp_path / "one", **lora(layers_to_transform=[0], use_rslora=True))
    two = trained(
        pico_folder, tmp_path / "two",
        **lora(layers_to_transform=[1], rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    )  # fmt: skip
    out = merged([one, two], tmp_path / "sum", method="task_arithmetic", result="adapter", base=str(pico_folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deltas = []
        for each in (one, two):
            model = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(pico_folder), str(each)
            ).merge_and_unload()
            deltas.append(model.state_dict())
    start = AutoModelForCausalLM.from_pretrained(pico_folder)
    start.load_state_dict(
        {name: deltas[0][name] + deltas[1][name] - tensor for name, tensor in start.state_dict().items()}
    )
    torch.testing.assert_close(under_peft(pico_folder, out), logits(start), atol=1e-4, rtol=1e-4)


def test_sums_refuse_what_no_sum_of_matrices_is(pico_folder: Path, tmp_path: Path) -> None:
    targets = [
        trained(pico_folder, tmp_path / "dora", **lora(use_dora=True)),
        trained(pico_folder, tmp_path / "pissa", **lora(init_lora_weights="pissa")),
    ]
    with pytest.raises(
        UserError, match=r"(?s)dora: an adapter with use_dora.*pissa: an adapter with init_lora_weights pissa"
    ):
        merged(targets, tmp_path / "out", result="adapter")


@pytest.mark.slow
def test_two_adapters_of_other_kinds_are_merged_together(pico_folder: Path, tmp_path: Path) -> None:
    """The mean of what peft makes of each."""
    targets = [
        trained(pico_folder, tmp_path / "dora", **lora(use_dora=True)),
        trained(pico_folder, tmp_path / "ia3", **KINDS["ia3"]),
    ]
    out = merged(targets, tmp_path / "out")
    mean = [load_pretrained(str(each), causal=True).model.state_dict() for each in targets]
    for name, tensor in opened(out).state_dict().items():
        torch.testing.assert_close(tensor, (mean[0][name] + mean[1][name]) / 2, atol=1e-6, rtol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dora", "ia3", "out"]
