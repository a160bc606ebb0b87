"""The local backend: ranks on this machine."""
