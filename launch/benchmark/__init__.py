"""Measurements of launch/bench.py: each section compares two ways to do the same work, side by side in one run."""
