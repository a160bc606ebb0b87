"""The mathematics of scoring, pruning and refitting: pure torch, no files, no processes."""
