"""Pure functions on tensors: losses, advantages, log-probabilities, packing. Imports only torch."""
