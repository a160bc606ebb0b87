"""Ranks that work on one stage together: the process group, models sharded with ZeRO-3, layer-by-layer passes."""
