"""Decoding kernels for the CPU."""
