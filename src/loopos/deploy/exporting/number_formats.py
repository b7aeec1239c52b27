"""Tensors in the number format that was asked for.

Enters: tensors. Leaves: the same in another format, or a refusal where it is too narrow. Left out: formats of a few
bits (`gguf_file.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loopos.config.faults import UserError

DTYPES: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises `UserError` for a tensor with numbers that are none."""
    if tensor.is_floating_point() and (bad := int((~torch.isfinite(tensor)).sum())):
        raise UserError(
            f"{name}: {bad:,} of {tensor.numel():,} numbers are not finite (nan or infinite); expected a model whose "
            "weights are numbers: go back to a checkpoint before it diverged"
        )


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another format. Raises `UserError` for numbers that are not finite, or would not be there."""
    require_finite(name, tensor)
    found = tensor.to(dtype)
    if dtype == torch.float16 and bool(found.isinf().any()):
        raise UserError(f"{name}: holds numbers up to {tensor.abs().max():.3g}, which f16 cannot; use --type bf16")
    return found
