"""What runs a plan: torch.distributed here, others beside it."""
