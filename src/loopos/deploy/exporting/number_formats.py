"""Tensors in the number format that was asked for.

Enters: tensors. Leaves: the same in another format, or a refusal where it is too narrow. Left out: formats of a few
bits (`gguf_file.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loopos.config.faults import UserError
from loopos.storage.tensor_files import require_finite

DTYPES: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another format. Raises `UserError` for numbers that are not finite, or would not be there."""
    require_finite(name, tensor)
    found = tensor.to(dtype)
    if dtype == torch.float16 and bool(found.isinf().any()):
        raise UserError(f"{name}: holds numbers up to {tensor.abs().max():.3g}, which f16 cannot; use --type bf16")
    return found
