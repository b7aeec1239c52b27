"""The parts of a pruning: what leaves a model in memory, and the report."""
