"""A user's package: each module adds variants of one kind. Its entry point of the group loopos.plugins names it."""

from own_variants import algorithms, exporters, formats, losses, merging, rewards, trackers

__all__ = ["algorithms", "exporters", "formats", "losses", "merging", "rewards", "trackers"]
