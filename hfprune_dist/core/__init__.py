"""The mathematics of the method: pure torch, no files, no processes."""
