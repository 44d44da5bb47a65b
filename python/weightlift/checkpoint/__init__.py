"""A path or a Hub id -> Checkpoint: an index of tensors, for every file format."""
