"""Trained models merged, joined, made smaller, written for others, served."""
