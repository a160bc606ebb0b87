"""lm-eval's tasks, answered by all ranks."""
