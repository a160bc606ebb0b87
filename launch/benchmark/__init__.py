"""What launch/bench.py measures: every section compares two ways to do the same work, side by side in one run."""
