"""Export a model for other programs, and check the export against the original."""
