"""Training: the optimizer step, the training loop, and everything that makes a run resumable."""
