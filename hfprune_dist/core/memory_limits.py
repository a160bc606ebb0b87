"""Limits on the memory that the code takes at a time, for what runs and for estimates, which do without torch."""

# Of one thread's portion on a CPU. A second-level cache holds it together with a result of the same size.
CACHE_BYTES = 2**19
# Of a portion on an accelerator: a pass over it takes longer than its launch, and scratch doesn't grow with the batch.
ACCELERATOR_BYTES = 2**26
# Of a chunk's logits. The head's weight is read twice for each chunk, so that small ones cost time.
CHUNK_BYTES = 32 * 2**20
# Of a rank's micro-batches, what is kept from one iteration of conjugate gradients to the next.
KEPT_BYTES = 4 * 2**30
# Of a portion of weights on its way to an accelerator.
PINNED_BYTES = 32 * 2**20
# Share of a device's free memory that whole weights may take; the rest is for activations, caches and logits.
WEIGHTS_SHARE = 0.6
