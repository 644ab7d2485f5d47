"""Data sets, their loaders and seeded partitions."""
