"""Room: bytes and tensors ↔ files that survive a crash; JSON files; whole folders or none."""
