"""Limits on the memory that the code uses at a time, shared with the estimates of it, which don't import torch."""

# Size of one thread's portion on a CPU. A second-level cache holds it together with a result of the same size.
CACHE_BYTES = 2**19
# Size of a portion on an accelerator: a pass over it outlasts its launch, and scratch doesn't grow with the batch.
ACCELERATOR_BYTES = 2**26
# Size of a chunk's logits. The head's weight is read twice for each chunk, so small chunks cost time.
CHUNK_BYTES = 32 * 2**20
# Size of what a rank keeps of its micro-batches from one iteration of conjugate gradients to the next.
KEPT_BYTES = 4 * 2**30
# Size of all layers' matrices up to which every rank adds up its own terms of them until they are saved or scored.
OWN_TERMS_BYTES = 8 * 2**30
# Most tokens that refits of norms see, or one window: factors are few, and more would only take time.
NORM_TOKENS = 2**15
# Size of the logits of all requests that are answered at a time, with their log-softmax.
LOGITS_BYTES = 4 * 2**30
