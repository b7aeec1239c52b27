"""Rollouts written by other processes: Ray actors and vLLM engines."""
