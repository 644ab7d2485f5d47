"""From a planned training step to C99 files."""
