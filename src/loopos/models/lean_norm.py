"""transformers' root-mean-square norms on a CPU, with `functional.rms_norm`'s backward pass.

Enters: a model. Leaves: the same, its norms of the kinds known here computed by that function. Left out: the function.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from loopos.functional.rms_norm import rms_norm

# Whose formula was read: w ⊙ round(x / √(mean x² + ε)). Others round elsewhere, or scale by 1 + w.
_CLASSES = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})


def make_norms_lean(model: nn.Module) -> None:
    """Lets the norms of a model compute in fewer passes, in place."""
    for module in model.modules():
        kind: Any = type(module)
        if kind.__name__ in _CLASSES:
            module.__class__ = _lean(kind)


@cache
def _lean(kind: Any) -> Any:
    class LeanNorm(kind):  # type: ignore[misc]  # a class that is known at run time alone
        def forward(self, hidden_states: Tensor) -> Tensor:
            norm: Any = self
            # Another device has kernels of its own; a weight of which each process holds a part has its own operations.
            if hidden_states.device.type != "cpu" or type(norm.weight) is not nn.Parameter:
                answer: Tensor = super().forward(hidden_states)
                return answer
            return rms_norm(hidden_states, norm.weight, norm.variance_epsilon)

    return LeanNorm
