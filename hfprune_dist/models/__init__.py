"""Models as torch modules: one layer at a time, memory-efficient backwards, loading."""
