"""A path or a Hub id -> Checkpoint: which tensor lives where, for every form of checkpoint."""
