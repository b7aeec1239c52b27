"""Quantized layers: every kernel gives the product with the dequantized weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loopos.functional.quantization import fitted_grid, rounded_rows
from loopos.generation.cpu.layers import kernel_layout
from loopos.models.load import cast_parameters
from loopos.models.quantized import QuantizedEmbedding, QuantizedLinear, exact_activations, num_weights, stored_form

WAYS = [(8, 48, False), (8, 50, False), (4, 64, False), (8, 48, True)]


def layer_of(bits: int, inputs: int, *, outputs: int = 32, rounds: bool = False) -> QuantizedLinear:
    """A layer with factors and a bias over a random weight, in fp32."""
    torch.manual_seed(bits + inputs)
    weight = torch.randn(outputs, inputs)
    grid = fitted_grid(weight, bits, inputs if bits == 8 else 32)
    parts = stored_form(grid.codes(weight), grid)
    layer = QuantizedLinear(
        *parts,
        factors=torch.rand(inputs).bfloat16() + 0.5,
        bias=torch.randn(outputs).bfloat16(),
        rounds_activations=rounds,
    )
    cast_parameters(layer, torch.float32)
    torch.testing.assert_close(layer.weight, grid.rounded(weight))
    return layer


@pytest.mark.parametrize(("bits", "inputs", "rounds"), WAYS)
@pytest.mark.parametrize("rows", [1, 3, 17, 80])
def test_products_in_bf16_are_those_of_the_weight_written_out(bits: int, inputs: int, rounds: bool, rows: int) -> None:
    """By torch's kernel for codes, with the weight written out for each product, and in oneDNN's layout; also for
    activations at an odd address.
    """
    layer = layer_of(bits, inputs, rounds=rounds)
    entered = torch.randn(rows * inputs + 1).bfloat16()[1:].view(1, rows, inputs)
    assert layer._weight_act_pre_scale is not None
    assert layer.bias is not None
    scaled = (entered.float() * layer._weight_act_pre_scale).bfloat16().float()
    expected = scaled @ layer.weight.t() + layer.bias
    cast_parameters(layer, torch.bfloat16)
    assert layer._weight_qdata.dtype == torch.int8
    found = [layer(entered)]
    with kernel_layout(layer):
        assert (layer.written_out is not None) == (not rounds and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        found.append(layer(entered))
    assert layer.written_out is None
    found.append(layer(entered[0]).unsqueeze(0))
    for product in found:
        assert product.dtype == torch.bfloat16
        assert product.shape == (1, rows, 32)
        assert float((product.float() - expected).abs().max()) < 0.02 * float(expected.abs().max())
    assert layer(entered[:, :0]).shape == (1, 0, 32) or rounds


def test_outputs_that_no_kernel_of_four_bits_takes() -> None:
    layer = layer_of(4, 64, outputs=24)
    entered = torch.randn(2, 64).bfloat16()
    expected = layer(entered.float())
    cast_parameters(layer, torch.bfloat16)
    assert float((layer(entered).float() - expected).abs().max()) < 0.03 * float(expected.abs().max())


def test_whole_numbers_by_hand() -> None:
    """Codes of both sides are multiplied exactly; each row keeps its own scale, whatever its neighbors."""
    layer = layer_of(8, 48, rounds=True)
    entered = torch.randn(5, 48) * torch.logspace(-2, 2, 5)[:, None]
    assert layer._weight_act_pre_scale is not None
    codes, scale = rounded_rows(entered * layer._weight_act_pre_scale)
    sums = codes.long() @ layer._weight_qdata.long().t()
    expected = sums.float() * scale * layer._weight_scale.t() + layer.bias
    torch.testing.assert_close(layer(entered), expected)
    torch.testing.assert_close(layer(entered[2:3]), layer(entered)[2:3])
    with exact_activations(layer):
        exact = (entered * layer._weight_act_pre_scale) @ layer.weight.t() + layer.bias
        torch.testing.assert_close(layer(entered), exact)
    assert layer.rounds_activations


def test_a_tied_embedding_is_saved_once() -> None:
    weight = torch.randn(20, 16)
    grid = fitted_grid(weight, 8, 16)
    codes, scale, _ = stored_form(grid.codes(weight), grid)
    table = QuantizedEmbedding(codes, scale)
    both = nn.ModuleList([table, table.as_output()])
    assert num_weights(both) == 320
    assert len(list(both.parameters())) == 2
    cast_parameters(both, torch.float32)
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(both[0](torch.tensor([[4, 19]])), grid.rounded(weight)[[4, 19]][None])
    torch.testing.assert_close(both[1](hidden), hidden @ grid.rounded(weight).t())
