"""The parts of a merge: sources, plan, values, methods, tensors, report."""
