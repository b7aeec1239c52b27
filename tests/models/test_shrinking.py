"""A shrunk model equals the full one with the same parts zeroed; blocks run one by one as in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from loopos.compression.blocks import (
    BlockPass,
    Linear,
    block_influence,
    channel_layers,
    drop_layers,
    head_shape,
    keep_channels,
    keep_groups,
    linears_of,
    possible_groups,
    set_channels,
    set_groups,
)
from loopos.config.diagnostics import UserError
from loopos.models.adapters import layer_list
from tests.generation.pico_language_models import FAMILIES, pico_model

WITH_HEADS = [name for name in FAMILIES if name != "gpt2"]
IDS = torch.arange(3, 27)[None]


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def reopened(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    opened: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    return opened


@pytest.mark.parametrize("family", WITH_HEADS)
def test_without_a_group_as_with_its_outputs_unread(family: str, tmp_path: Path) -> None:
    # In fp64: fewer heads sum in another order, and sharp attention makes much of a rounding.
    whole, model = (pico_model(family).to(torch.float64) for _ in range(2))
    shape = head_shape(model)
    assert (shape.groups, shape.queries, shape.size) == (2, 2, 8)
    for index, remaining in enumerate((1, 0)):
        dropped = shape.outputs([1 - remaining], shape.queries)
        layer_list(whole)[index].self_attn.o_proj.weight.data[:, dropped] = 0
        keep_groups(model, layer_list(model)[index], [remaining])
    set_groups(model, 1)
    torch.testing.assert_close(logits(model), logits(whole))
    again = reopened(model, tmp_path)
    assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (2, 1)
    assert again.config.head_dim == 8
    # Norms and rotary positions compute in fp32 whatever the model's format, and other attention kernels round otherwise.
    torch.testing.assert_close(logits(again), logits(whole), rtol=1.3e-6, atol=1e-5)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_without_channels_as_with_them_unread(family: str, tmp_path: Path) -> None:
    whole, model = pico_model(family), pico_model(family)
    remaining = torch.tensor([0, 3, 4, 17, 63])
    silent = torch.ones(64, dtype=torch.bool)
    silent[remaining] = False
    for block in layer_list(whole):
        channel_layers(whole, block)[1].weight[:, silent] = 0
    for block in layer_list(model):
        keep_channels(model, block, remaining)
    set_channels(model, 5)
    torch.testing.assert_close(logits(model), logits(whole))
    torch.testing.assert_close(logits(reopened(model, tmp_path)), logits(whole))


def silence(block: Any) -> None:
    """What a block adds to the residual stream becomes nothing."""
    for linear in linears_of(block):
        if linear.name.rpartition(".")[2] in ("o_proj", "down_proj", "c_proj"):
            linear.weight.zero_()
            if getattr(linear.module, "bias", None) is not None:
                linear.module.bias.data.zero_()


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_layer_as_with_it_silent(family: str, index: int, tmp_path: Path) -> None:
    whole, model = pico_model(family), pico_model(family)
    silence(layer_list(whole)[index])
    drop_layers(model, [index])
    torch.testing.assert_close(logits(model), logits(whole))
    again = reopened(model, tmp_path)
    assert again.config.num_hidden_layers == len(layer_list(again)) == 1
    kinds = getattr(whole.config, "layer_types", None)
    if kinds is not None:
        assert again.config.layer_types == [kinds[1 - index]]
    torch.testing.assert_close(logits(again), logits(whole))
    # The cache counts layers by their numbers.
    made = again.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made.shape == (1, IDS.shape[1] + 3)


def test_what_cannot_be_shrunk_is_refused() -> None:
    gpt2 = pico_model("gpt2")
    with pytest.raises(UserError, match="gpt2: its config derives the size of a head"):
        head_shape(gpt2)
    with pytest.raises(UserError, match="all 2 layers would be removed"):
        drop_layers(gpt2, [0, 1])
    gpt2.config.model_type = "falcon"
    with pytest.raises(UserError, match="falcon: channels of this family cannot be removed; expected one of llama"):
        channel_layers(gpt2, layer_list(gpt2)[0])


def test_llama_needs_a_width_that_its_heads_divide() -> None:
    model = pico_model("llama")
    model.config.hidden_size, model.config.num_attention_heads, model.config.num_key_value_heads = 576, 9, 3
    assert possible_groups(model) == [1, 2, 3]  # 3, 6 and 9 heads of 64
    model.config.num_attention_heads, model.config.num_key_value_heads = 8, 8
    assert possible_groups(model) == [1, 2, 3, 4, 6, 8]  # 5 and 7 do not divide 576


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_see_what_they_see_in_the_model(family: str) -> None:
    model = pico_model(family)
    rows = torch.randint(3, 400, (3, 12), generator=torch.Generator().manual_seed(0))
    seen: dict[tuple[int, str], list[Tensor]] = {}
    for index, block in enumerate(layer_list(model)):
        for linear in linears_of(block):
            linear.module.register_forward_hook(
                lambda _m, args, _o, key=(index, linear.name): seen.setdefault(key, []).append(args[0][0])
            )
    for row in rows:
        model(input_ids=row[None])
    expected = {key: torch.cat(entered) for key, entered in seen.items()}
    run = BlockPass(model, layer_list(model), rows)
    found = 0
    for index, block in run.blocks_in_order():
        linears = linears_of(block)
        whole, diagonal = run.products(index, linears, diagonal=False), run.products(index, linears, diagonal=True)
        for linear in linears:
            entered = expected[index, linear.name]
            torch.testing.assert_close(whole[linear.name], entered.t() @ entered, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(diagonal[linear.name], entered.square().sum(0), rtol=1e-4, atol=1e-3)
            found += 1
    assert found == len(expected) == (8 if family == "gpt2" else 14)


@torch.no_grad()
def test_block_influence() -> None:
    """A silent block has none; another has one minus the mean cosine of what enters and what leaves."""
    model = pico_model("llama")
    rows = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    states = [model(input_ids=row[None], output_hidden_states=True).hidden_states for row in rows]
    before = np.concatenate([each[0][0].numpy() for each in states]).astype(np.float64)
    after = np.concatenate([each[1][0].numpy() for each in states]).astype(np.float64)
    cosines = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    silence(layer_list(model)[1])
    found = block_influence(model, layer_list(model), rows)
    assert found[0] == pytest.approx(1 - cosines.mean(), abs=1e-9)
    assert found[1] == pytest.approx(0.0, abs=1e-12)


def test_a_conv1d_is_seen_as_outputs_by_inputs() -> None:
    block: Any = layer_list(pico_model("gpt2"))[0]
    linear = Linear("c_fc", block.mlp.c_fc)
    assert linear.weight.shape == (64, 32)
    row, bias = linear.weight[5].clone(), block.mlp.c_fc.bias[5].clone()
    linear.take(outputs=torch.tensor([5, 6]))
    assert torch.equal(linear.weight[0], row)
    assert torch.equal(block.mlp.c_fc.bias[0], bias)
    assert block.mlp.c_fc(torch.zeros(1, 32)).shape == (1, 2)
