"""New weights for what stays of a model, and how far from the dense model candidate shapes are with them.

Refits of output projections, by least squares (``least_squares_fit``):
    ``dense_refit`` fits each layer on the dense model's activations;
    ``sequential_refit`` fits layer by layer on what the pruned model makes of the windows, and continues with
    ``gauss_newton_ranks``, which moves all weights of an MLP;
    ``bias_refit`` only adds biases;
    ``cheap_fits`` fits one layer to many sizes at once, for candidates.

A refit of all norms, once all else is known of the pruned model (``pruned_layers``): ``norms_refit``, by the gradients
of ``norm_gradients``.

LoRAP, which prunes neurons and gives attention low-rank matrices: ``low_rank_pass``.

Divergence of candidates from the dense model: ``measurement``, on layers from ``cheap_fits`` or ``finished_layers``.

What is done so far, on disk: ``refitted_layers``, ``low_rank_layers``.
"""
