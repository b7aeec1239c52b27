"""The acts of `loopos demo`."""
