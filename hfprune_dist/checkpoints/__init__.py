"""Hugging Face checkpoints: architectures, reading, cutting and writing weights."""
