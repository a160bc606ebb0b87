"""New weights for what stays of a model, and how far from the dense model it is with them.

Refits, layer by layer:
    ``output_refit`` fits output projections by least squares, each layer's on the dense model's activations;
    ``sequential_refit`` fits layer by layer on what the pruned model makes of the windows, and continues with
    ``gauss_newton_ranks``, which moves all weights of an MLP;
    ``bias_refit`` only adds biases;
    ``low_rank`` is LoRAP, which prunes neurons and gives attention low-rank matrices.
What they have done so far is on disk: ``refitted_layers``.

A refit of all norms, once all else is known of the pruned model: ``norms_refit``.

Divergence from the dense model: ``measurement``, of many shapes with ``cheap_fits`` or of a refitted model.
"""
