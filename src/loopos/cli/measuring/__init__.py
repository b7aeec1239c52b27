"""Trained models applied to data and measured on it."""
