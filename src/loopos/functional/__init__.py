"""Pure mathematics on tensors: reductions and losses. Torch alone."""
