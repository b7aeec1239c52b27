"""The zeros of a pruned model, which training keeps.

Enters: a model as it was loaded. Leaves: masks of its weights, True = zero, and to stay so. They follow from the
weights that a run begins with, so a resumed run finds the same. Left out: applying them (`precision.Masters`).
"""

from __future__ import annotations

from torch import Tensor, nn


def zeros_to_keep(model: nn.Module) -> dict[str, Tensor]:
    """By the parameter's name the zeros of every matrix that has some, embeddings left out.

    A matrix of zeros alone is no pruned one: new heads and adapters begin so. Biases and norms may be zero by chance.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or id(parameter) in embeddings:
            continue
        zeros = parameter.detach() == 0
        if zeros.any() and not zeros.all():
            masks[name] = zeros
    return masks
