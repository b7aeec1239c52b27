"""An HTTP server for language models, heads and reward models."""
