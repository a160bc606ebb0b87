"""KV groups of grouped-query attention: key-value heads, each with the query heads that read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfprune_dist.structures import KV_GROUPS
from hfprune_dist.structures.units import Block, Owned, Units, read_counts


def kv_groups(config: Mapping[str, Any], attention: Block, projections: Sequence[str]) -> Units:
    """Return the KV groups of a model: query head ``j`` belongs to group ``j // (query heads per group)``.

    Each group owns its rows of the query, key and value projections, weights and biases, and its columns of the output
    projection. Norms over a head's channels (``q_norm``, ``k_norm``) are shared by all heads and stay.

    Args:
        config: the model's ``config.json``, including the number of key-value heads and the size of a head.
        projections: names of the query, key, value and output projections within the attention.
    """
    query, key, value, output = (f"{attention.name}.{name}" for name in projections)
    head_dim = int(config["head_dim"])
    queries = int(config["num_attention_heads"]) // int(config["num_key_value_heads"])
    owned = ((query, queries * head_dim), (key, head_dim), (value, head_dim))
    return Units(
        kind=KV_GROUPS,
        counts=read_counts(config, "num_key_value_heads"),
        rows=tuple(Owned(f"{name}.{part}", 0, size) for name, size in owned for part in ("weight", "bias")),
        output=output,
        block=attention,
        channels_per_unit=queries * head_dim,
        fields={"num_attention_heads": queries, "num_key_value_heads": 1},
        implied={"head_dim": head_dim},
    )


def whole_groups(config: Mapping[str, Any], attention: Block) -> Units:
    """Return the KV groups of a model whose attention can't lose any; they own no parameters, and count as if all
    layers had as many, since a class of transformers may give those of one kind fewer (``gemma4_text``).
    """
    return Units(
        kind=KV_GROUPS,
        counts=(int(config["num_key_value_heads"]),) * int(config["num_hidden_layers"]),
        rows=(),
        output=attention.name,
        block=attention,
        channels_per_unit=1,
        fields={},
    )
