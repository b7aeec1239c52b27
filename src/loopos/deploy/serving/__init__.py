"""The parts of a server: requests, limits, the model's thread, answers, metrics."""
