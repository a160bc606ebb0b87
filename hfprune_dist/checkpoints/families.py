"""Model families, the only adapter between architectures and the rest: names of parts in modules and in files.

The parts are found in a checkpoint (see ``discovery``); the defaults here are those of a Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from hfprune_dist.checkpoints.layer_settings import OTHER_LAYERS
from hfprune_dist.errors import UserError
from hfprune_dist.structures import LAYERS
from hfprune_dist.structures.experts import WIDTHS, Experts, Projections, units_of_mixture
from hfprune_dist.structures.layout import HIDDEN, OF_HIDDEN, OF_VOCABULARY, VOCABULARY, Dimensions, Layout
from hfprune_dist.structures.low_rank import read_ranks
from hfprune_dist.structures.units import OLDER_WIDTHS, OTHER_WIDTHS, Block, Units, kv_groups, neurons

if TYPE_CHECKING:
    from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Endings of the names of transformers' classes.
CAUSAL, WITH_VISION = "ForCausalLM", "ForConditionalGeneration"


@dataclass(frozen=True)
class Family:
    """Names of the parts of a decoder-only architecture with one MLP, or experts, in each layer.

    Attributes:
        tensors: names of the tensors that a model computes with, a head included even if it is tied; others in a
            checkpoint's files are ignored when it is loaded.
        adapted_attention: names within a layer of the linear layers that LoRA adapts in attention, of all its kinds.
        projections: the MLP's row projections, its down projection, and the number of matrices in each row projection,
            one after the other: two if it holds both gate and up.
        mlp_norm, attention_norm: the norm whose output the block reads; None: the block reads the residual stream.
        mlp_norm_after, attention_norm_after: the norm that the block's outputs go through, if any.
        task: the ending of its transformers class's name.
        keeps_apart: whether sequences that share a row can't see each other, given positions that restart with each.
        whole_groups: why its KV groups can't be pruned; empty if they can.
        no_low_rank: why its attention's matrices can't be given a low rank; empty if they can.
        no_sequence: why its blocks can't be refitted one after another; empty if they can.
        experts: the experts that some or all of its layers have in place of one MLP, if any.
    """

    model_type: str
    architecture: str
    tensors: frozenset[str] = frozenset()
    body: str = "model"
    head: str = "lm_head"
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    attention_norm_after: str | None = None
    attention_projections: tuple[str, ...] = ATTENTION
    adapted_attention: tuple[str, ...] = tuple(f"self_attn.{name}" for name in ATTENTION)
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_norm_after: str | None = None
    projections: Projections = (("gate_proj", "up_proj"), "down_proj", 1)
    task: str = CAUSAL
    keeps_apart: bool = True
    whole_groups: str = ""
    no_low_rank: str = ""
    no_sequence: str = ""
    experts: Experts | None = None

    @property
    def plain_class(self) -> str:
        """Name of the transformers class whose layers are all alike."""
        return f"{self.architecture}{self.task}"

    @property
    def has_vision(self) -> bool:
        """Whether this is the text decoder inside a model of images and text."""
        return self.task != CAUSAL

    @property
    def pruned_class(self) -> str:
        """Name of the class in ``modeling_pruned.py`` whose layers may differ in width or heads."""
        return f"Pruned{self.plain_class}"

    @property
    def pruned_body(self) -> str:
        """Name of that class without the head, in the same file."""
        text = "Text" if self.model_type.endswith("_text") else ""
        return f"Pruned{self.architecture.removesuffix('Text')}{text}Model"

    @property
    def attention_modules(self) -> list[str]:
        """Names within a layer of attention's projections: if these are separate, query, key, value, output."""
        return [f"{self.attention}.{name}" for name in self.attention_projections]

    @property
    def embedding_tensor(self) -> str:
        """Name of the table of token embeddings [vocabulary, hidden_size]."""
        return f"{self.embedding}.weight"

    @property
    def head_tensor(self) -> str:
        """Name of the head's weight [vocabulary, hidden_size]; a checkpoint whose head is tied may lack it."""
        return f"{self.head}.weight"

    def structures(self, config: Mapping[str, Any]) -> dict[str, Units]:
        """All kinds of units in a model with this ``config.json``, by name; the main ones first: the neurons of its
        MLPs, or of its experts.
        """
        mlp = self._block(config, self.mlp, self.mlp_norm, self.mlp_norm_after)
        if self.experts is None:
            found = [neurons(config, mlp, *self.projections)]
        else:
            found = units_of_mixture(config, mlp, self.experts, self.projections)
        attention = self._block(config, self.attention, self.attention_norm, self.attention_norm_after)
        projections = () if self.whole_groups else self.attention_projections
        groups = kv_groups(self.completed(config), attention, projections)
        return {units.kind: units for units in (*found, groups)}

    def layout(self, config: Mapping[str, Any], names: Iterable[str]) -> Layout:
        """The axes that tensors of these names follow in a model with this ``config.json``."""
        units = [*self.structures(config).values()]
        norms = (self.attention_norm, self.attention_norm_after, self.mlp_norm, self.mlp_norm_after)
        inside = {f"{name}.{part}": (OF_HIDDEN,) for name in norms if name for part in ("weight", "bias")}
        inside |= {f"{kind.output}.bias": (OF_HIDDEN,) for kind in units}
        outside: dict[str, Dimensions] = {f"{self.head}.bias": (OF_VOCABULARY,), f"{self.norm}.weight": (OF_HIDDEN,)}
        outside |= dict.fromkeys((self.embedding_tensor, self.head_tensor), (OF_VOCABULARY, OF_HIDDEN))
        sizes = {VOCABULARY: config["vocab_size"], HIDDEN: config["hidden_size"], LAYERS: config["num_hidden_layers"]}
        return Layout.of_model(names, self.layers, units, inside, outside, sizes)

    def _block(self, config: Mapping[str, Any], name: str, norm: str | None, norm_after: str | None) -> Block:
        multiplier = config.get("residual_multiplier")
        return Block(self.layers, name, norm, norm_after, 1.0 if multiplier is None else float(multiplier))

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The ``config.json`` with the number of key-value heads and the size of a head filled in."""
        queries = int(config["num_attention_heads"])
        groups = config.get("num_key_value_heads") or queries
        head_dim = config.get("head_dim") or config["hidden_size"] // queries
        return {**config, "num_key_value_heads": groups, "head_dim": head_dim}

    def ranks(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Ranks of attention's low-rank projections under this ``config.json``; see ``structures.low_rank``."""
        return read_ranks(config, self.attention, self.attention_projections)

    def body_of(self, model: nn.Module) -> nn.Module:
        """The decoder without its head: input_ids -> last_hidden_state, final norm included."""
        return model.get_submodule(self.body)

    def head_of(self, model: nn.Module) -> nn.Linear:
        return cast("nn.Linear", model.get_submodule(self.head))

    def layers_of(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.layers).children())


# Keys of a config.json, and their values, that rule a model out -> why.
_SEES_AHEAD = "its tokens see those that follow, so that no output predicts the next one"
_RULED_OUT: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("audio_config", lambda value: value is not None, "it is an audio-text model"),
    ("is_encoder_decoder", bool, "it is an encoder-decoder"),
    ("is_causal", lambda value: value is False, _SEES_AHEAD),
    ("use_bidirectional_attention", lambda value: value in (True, "all"), _SEES_AHEAD),
)
# Architectures that could be taken for supported ones -> why they aren't.
_UNFIT = {
    "llama4_text": "routers multiply what its experts read, not what they make",
    "jetmoe": "its attention has experts too",
    "diffllama": "its attention computes with a layer's number",
    **dict.fromkeys(("minicpm3", "beam"), "what its layers add is scaled by how many there are"),
    **dict.fromkeys(("deepseek_v4", "hy_v4", "gemma3n_text"), "several residual streams run through its layers"),
    **dict.fromkeys(
        ("inkling_text", "inkling2_text", "inkling2_loop_text"), "its shared experts are routed to as well"
    ),
    "falcon_h1": "its model, not its layers, makes the scales of their state-space blocks",
    "olmo_hybrid": "transformers makes no layer of it alone",
    **dict.fromkeys(("zamba", "zamba2"), "its layers share their MLPs"),
}
NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def normalized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with ``intermediate_size``, ``num_hidden_layers`` and single numbers for lists of equal ones."""
    told = dict(config)
    if OTHER_LAYERS in config:
        told.setdefault("num_hidden_layers", config[OTHER_LAYERS])
    for key in ("moe_topk", "moe_intermediate_size"):
        values = config.get(key)
        if isinstance(values, list) and values and values == values[:1] * len(values):
            told[key] = values[0]
    names = tuple[str, ...](() if config.get("num_local_experts") else OTHER_WIDTHS)
    names += () if "intermediate_size" in config else (*OLDER_WIDTHS, WIDTHS[0])
    return told | next(({"intermediate_size": told[key]} for key in names if key in told), {})


def refuse_other_kinds(config: Mapping[str, Any], where: str) -> None:
    """Refuse models that aren't decoders of a supported kind, saying what they are or what their config.json lacks."""
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{where}: model_type is {config.get('model_type')!r}; it must name an architecture")
    if unfit := _UNFIT.get(config["model_type"]):
        raise not_supported(config, where, unfit)
    for key, rules_out, why in _RULED_OUT:
        if rules_out(config.get(key)):
            raise not_supported(config, where, f"{why} ({key})")
    if missing := [key for key in NEEDED if key not in config]:
        raise not_supported(config, where, f"config.json has no {', '.join(missing)}")


def not_supported(config: Mapping[str, Any], where: str, why: str) -> UserError:
    """The error to raise for a model that can't be pruned."""
    return UserError(
        f"{where}: model_type {str(config.get('model_type'))!r} is not supported: {why}. Supported: decoders whose "
        "layers have one MLP, or gated experts (hfprune_dist/checkpoints/README.md lists those that are tested)"
    )
