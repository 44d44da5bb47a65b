"""Checkpoint + placement -> LoadPlan -> tensors: options, what is planned, what runs."""
