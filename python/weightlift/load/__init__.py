"""Checkpoint + placement -> LoadPlan -> tensors: options, plans, running loads, allocation."""
