"""Efficient training where compute, memory or bandwidth is scarce.

``import efftrain`` is cheap on purpose: it loads neither torch nor flwr. Import the package you need,
e.g. ``from efftrain.compression import TopK``.
"""

__version__ = "0.1.0"
