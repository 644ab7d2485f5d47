"""Federated rounds on Flower's Message API."""
