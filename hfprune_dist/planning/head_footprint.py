"""Memory that the head takes for a chunk of tokens, however many tokens there are (``core.head``)."""

from __future__ import annotations

from hfprune_dist.core.memory_limits import CHUNK_BYTES

# Logits and another loss's gradient in bfloat16; in float32, which is twice as wide, the logits, exponentials and their
# products.
HEAD_CHUNK_BYTES = 2 * CHUNK_BYTES + 3 * 2 * CHUNK_BYTES
