"""Text files become a tree with positions, then frozen sections, or diagnostics that name their line."""
