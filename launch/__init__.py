"""The commands, and the only place that starts processes."""
