"""hfprune_dist: from a Hugging Face causal LM to pruned, recovered, evaluated checkpoints and a table of results."""

__version__ = "0.1.0"
