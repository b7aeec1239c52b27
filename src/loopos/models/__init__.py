"""Pretrained models: loading and saving them, packed attention, heads, adapters."""
