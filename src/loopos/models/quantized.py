"""Layers with quantized weights, and the kernels that multiply by them. They replace transformers' linear layers and
embeddings and cannot be trained.

Tensors have torchao's names (`_weight_qdata` …), so `quantized_folder.py` writes `state_dict` as it is.
Letters: K inputs, N outputs, G groups of K/G inputs, R rows of activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loopos.functional.quantization import GRID_FORMAT, Grid, pack_nibbles, rounded_rows, unpack_nibbles

# Up to this many rows, torch's kernel for codes is faster than a product with the dequantized weight, as
# measured on a CPU with AVX-512 at 576 × 576 and 1536 × 576.
_MOST_ROWS = {8: 16, 4: 48}
_FEWEST_ROWS_ON_CUDA = 17


class QuantizedWeight(nn.Module):
    """A quantized weight `[N, K]`: 8-bit codes `[N, K]` with one scale per row `[N, 1]`, or 4-bit codes, two per byte,
    `[N, K/2]` with scale and zero point per group `[G, N]`.
    """

    _weight_qdata: nn.Parameter
    _weight_scale: nn.Parameter
    _weight_zero_point: nn.Parameter | None

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """The tensors in their stored form. Without zero points the codes have 8 bits, otherwise 4."""
        super().__init__()
        self._weight_qdata = _fixed(codes)
        self._weight_scale = _fixed(scale)
        self._weight_zero_point = None if zero is None else _fixed(zero)

    @property
    def bits(self) -> int:
        return 8 if self._weight_zero_point is None else 4

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        outputs, width = self._weight_qdata.shape
        return outputs, width * 8 // self.bits

    @property
    def group(self) -> int:
        """Number of inputs that share a scale."""
        return self.shape[1] // (1 if self.bits == 8 else len(self._weight_scale))

    @property
    def weight(self) -> Tensor:
        """The dequantized W `[N, K]`, in the format of the scales."""
        if self._weight_zero_point is None:
            return self._weight_qdata.to(self._weight_scale.dtype) * self._weight_scale
        grid = Grid(4, self._weight_scale.t(), self._weight_zero_point.t())
        if self._weight_scale.dtype != torch.bfloat16:
            return grid.values(unpack_nibbles(self._weight_qdata))
        # A table from a byte to its two codes: three times as fast as shifts.
        table = _pairs(self._weight_qdata.device)
        codes = table.index_select(0, self._weight_qdata.view(torch.uint8).int().flatten()).view(torch.bfloat16)
        return grid.values(codes.view(self.shape))


class QuantizedLinear(QuantizedWeight):
    """y = W(a ∘ x) + b, with an optional factor a per input (AWQ's 1/s). `rounds_activations`: each row of a ∘ x is
    rounded to 8 bits with its own scale, and the product is an integer product.
    """

    _weight_act_pre_scale: nn.Parameter | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        factors: Tensor | None = None,
        bias: Tensor | None = None,
        rounds_activations: bool = False,
    ) -> None:
        super().__init__(codes, scale, zero)
        assert not (rounds_activations and zero is not None), "whole numbers times codes with a zero"
        self._weight_act_pre_scale = None if factors is None else _fixed(factors)
        self.bias = None if bias is None else _fixed(bias)
        self.rounds_activations = rounds_activations
        self.written_out: Tensor | None = None
        """W in the layout of oneDNN's products, while `generation.kernel_layout` holds it."""
        self._packed: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """`[..., K]` → `[..., N]`, in the input's format."""
        rows = input.reshape(-1, input.shape[-1])
        if self._weight_act_pre_scale is not None:
            rows = rows * self._weight_act_pre_scale.to(rows.dtype)
        product = self._product(rows)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.reshape(*input.shape[:-1], self.out_features) if input.dim() != 2 else product

    def _product(self, rows: Tensor) -> Tensor:
        """a ∘ x `[R, K]` → W(a ∘ x) `[R, N]`."""
        if self.rounds_activations and self._multiplies_whole_numbers(rows):
            return self._whole_numbers(rows)
        # Like the codes: the kernels crash on unaligned activations.
        if rows.device.type == "cpu" and (not rows.is_contiguous() or rows.data_ptr() % 64):
            rows = rows.clone(memory_format=torch.contiguous_format)
        if self.written_out is not None:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.written_out, None, "none", [], "")
            return product
        if rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and 0 < len(rows) <= _MOST_ROWS[self.bits]:
            if self.bits == 8 and self._takes_eight_bits:
                scale = self._weight_scale.flatten().to(rows.dtype)
                return torch.ops.aten._weight_int8pack_mm(rows, self._weight_qdata, scale)  # type: ignore[no-any-return]
            if self.bits == 4 and self.shape[0] % 16 == 0:
                return self._four_bits(rows)
        return linear(rows, self.weight.to(rows.dtype))

    @property
    def _takes_eight_bits(self) -> bool:
        # torch 2.13 reads 16 codes at a time without checks: other widths give wrong numbers, and unaligned codes, as
        # in a mapped file, crash the process.
        return self.shape[1] % 16 == 0 and self._weight_qdata.data_ptr() % 16 == 0

    def _four_bits(self, rows: Tensor) -> Tensor:
        assert self._weight_zero_point is not None, "four bits have zeros"
        if self._packed is None:
            codes = unpack_nibbles(self._weight_qdata).int() + 8
            self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self._grid = torch.stack([self._weight_scale, self._weight_zero_point], -1).to(GRID_FORMAT)
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._packed, self.group, self._grid)
        return product

    def _multiplies_whole_numbers(self, rows: Tensor) -> bool:
        # CUDA's product needs sizes divisible by 8.
        return rows.device.type != "cuda" or all(size % 8 == 0 for size in self.shape)

    def _whole_numbers(self, rows: Tensor) -> Tensor:
        codes, scale = rounded_rows(rows)
        few = len(rows) if rows.device.type == "cuda" else _FEWEST_ROWS_ON_CUDA
        if few < _FEWEST_ROWS_ON_CUDA:
            codes = torch.cat([codes, codes.new_zeros(_FEWEST_ROWS_ON_CUDA - few, codes.shape[1])])
        sums = torch._int_mm(codes, self._weight_qdata.t())[: len(rows)]
        return (sums * (scale * self._weight_scale.flatten())).to(rows.dtype)


class QuantizedEmbedding(QuantizedWeight):
    """A table `[N, K]` of N tokens in 8 bits, each with its own scale."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__(codes, scale, None)

    @property
    def num_embeddings(self) -> int:
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.shape[1]

    def forward(self, input: Tensor) -> Tensor:
        """ids `[...]` → `[..., K]`, in the scales' format."""
        return self._weight_qdata[input].to(self._weight_scale.dtype) * self._weight_scale[input]

    def as_output(self) -> QuantizedLinear:
        """The output layer over the same tensors, for models that tie the two."""
        tied = QuantizedLinear(self._weight_qdata, self._weight_scale, None)
        tied._weight_qdata, tied._weight_scale = self._weight_qdata, self._weight_scale
        return tied


def stored_form(codes: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes `[N, K]` and their grid as a layer stores them: qdata, scale and zero point in `GRID_FORMAT`."""
    if grid.zero is None:
        return codes.contiguous(), grid.scale.to(GRID_FORMAT).contiguous(), None
    scale, zero = (each.t().to(GRID_FORMAT).contiguous() for each in (grid.scale, grid.zero))
    return pack_nibbles(codes).contiguous(), scale, zero


def quantized_layers(model: nn.Module) -> list[tuple[str, QuantizedWeight]]:
    """Name and layer of all quantized layers, including layers that share another's weight."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedWeight)]


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedWeight) for module in model.modules())


def num_weights(model: nn.Module) -> int:
    """Number of parameters as before quantization, tied ones once; scales, zero points and factors do not count."""
    layers = {id(layer._weight_qdata): layer for _, layer in quantized_layers(model)}
    own = {id(p) for layer in layers.values() for name, p in layer.named_parameters() if name.startswith("_weight_")}
    others = sum(p.numel() for p in model.parameters() if id(p) not in own)
    return others + sum(layer.shape[0] * layer.shape[1] for layer in layers.values())


@contextmanager
def exact_activations(model: nn.Module) -> Iterator[None]:
    """Within the context no layer rounds its activations. Comparisons of two paths through a model need it, because one
    code rounded to the other side would look like another order of operations.
    """
    rounding = [each for each in model.modules() if isinstance(each, QuantizedLinear) and each.rounds_activations]
    for each in rounding:
        each.rounds_activations = False
    try:
        yield
    finally:
        for each in rounding:
            each.rounds_activations = True


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _pairs(device: torch.device) -> Tensor:
    """int32 `[256]`: the two codes of each byte in bf16, side by side."""
    codes = unpack_nibbles(torch.arange(256, dtype=torch.uint8).view(torch.int8)[:, None])
    return codes.to(torch.bfloat16).view(torch.int32).flatten().to(device)
