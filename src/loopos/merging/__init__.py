"""Merge models and adapters into one."""
