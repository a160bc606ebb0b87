"""Planning: the stages that a sweep needs, the methods that a model takes, and the ratios and shapes it can reach."""
