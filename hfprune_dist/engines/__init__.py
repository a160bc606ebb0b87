"""Engines that serve models, each run in a process of its own, and checks that they compute what transformers does."""
