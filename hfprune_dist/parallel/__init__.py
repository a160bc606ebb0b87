"""Processes that work on one stage together: the process group, and models sharded over it with ZeRO-3."""
