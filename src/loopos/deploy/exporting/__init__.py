"""The formats that a model is exported to."""
