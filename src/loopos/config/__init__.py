"""The config room: a text file becomes a tree with places, then frozen models, or faults that name their line."""
