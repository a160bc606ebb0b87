"""What pruning removes as a whole, and what of a checkpoint belongs to it."""
