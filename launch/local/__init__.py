"""The local backend: torchrun on this machine."""
