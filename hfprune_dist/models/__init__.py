"""Models as torch modules: loading, running one layer at a time, and memory-efficient backward passes."""
