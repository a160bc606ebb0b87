"""Which stages a sweep needs, which ratios a model can reach, and what fits a GPU."""
