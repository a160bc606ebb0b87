"""Planning: the stages a sweep needs, the ratios a model can reach, and what fits on a GPU."""
