"""Data sets, their loaders and seeded partitions. Needs NumPy, not torch."""

from efftrain.data.dataset import ArrayDataset, Dataset
from efftrain.data.fashion_mnist import download_fashion_mnist
from efftrain.data.partition import Heterogeneity, by_group, dirichlet, heterogeneity, iid, shards
from efftrain.data.registry import DATASETS, load_dataset
from efftrain.data.watch import Span, Standardizer, WatchData, load_watch, standardize

__all__ = [
    "DATASETS",
    "ArrayDataset",
    "Dataset",
    "Heterogeneity",
    "Span",
    "Standardizer",
    "WatchData",
    "by_group",
    "dirichlet",
    "download_fashion_mnist",
    "heterogeneity",
    "iid",
    "load_dataset",
    "load_watch",
    "shards",
    "standardize",
]
