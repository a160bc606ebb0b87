"""Evaluation on lm-eval's tasks by all ranks, and timed generation."""
