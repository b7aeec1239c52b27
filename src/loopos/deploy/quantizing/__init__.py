"""Trained models with their weights as codes of eight or four bits."""
