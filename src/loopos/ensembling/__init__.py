"""Combine trained models into an ensemble."""
