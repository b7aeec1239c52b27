"""Rollouts from other processes: Ray actors and vLLM engines."""
