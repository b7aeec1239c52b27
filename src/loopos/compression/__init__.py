"""Prune and quantize a model, with a report of what it cost."""
