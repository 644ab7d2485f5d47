"""Cluster training: one plan over torch.distributed."""
