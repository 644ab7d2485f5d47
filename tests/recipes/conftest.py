"""Ranks without a launcher, for recipes of many."""

from tests.distributed.conftest import start_ranks

__all__ = ["start_ranks"]
