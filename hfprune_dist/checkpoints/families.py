"""Model families, the only adapter between architectures and the rest: names of parts in modules and in files.

Four families are listed, with what their checkpoints must hold. For others, whose MLPs also compute
``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``, the parts are found in the checkpoint (see ``discovery``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from hfprune_dist.checkpoints.layer_settings import OTHER_LAYERS
from hfprune_dist.errors import UserError
from hfprune_dist.structures.experts import (
    WIDTHS,
    Experts,
    Projections,
    dense_neurons,
    expert_neurons,
    shared_neurons,
    whole_experts,
)
from hfprune_dist.structures.kv_groups import kv_groups, whole_groups
from hfprune_dist.structures.low_rank import linear_modules, read_ranks
from hfprune_dist.structures.neurons import OLDER_WIDTHS, OTHER_WIDTHS, neurons
from hfprune_dist.structures.units import OUTPUT_BIASES, Block, Units

if TYPE_CHECKING:
    from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Endings of the names of transformers' classes.
CAUSAL, WITH_VISION = "ForCausalLM", "ForConditionalGeneration"


@dataclass(frozen=True)
class Family:
    """Names of the parts of a decoder-only architecture with one MLP in each layer.

    Attributes:
        biases: (key of config.json, projections that have a bias if it is true); with no key, they always have one.
        heads: its configuration class's defaults for ``num_key_value_heads`` and ``head_dim``; without one, there is
            one key-value head for each query head, and the heads together make up ``hidden_size``.
        twin: the model_type that computes the same if there are no biases, for numbers of heads that don't divide
            ``hidden_size``, which this one's configuration class refuses; None if there is none.
        any_heads: whether its configuration class accepts numbers of heads that don't divide ``hidden_size``.
        adapted_attention: names within a layer of the linear layers that LoRA adapts in attention, of all its kinds in
            the model; empty if these are the layers called ``attention_projections``, and no others are.
        row_parts: number of matrices in each row projection, one after the other: two if it holds both gate and up.
        mlp_norm, attention_norm: the norm whose output the block reads; None: the block reads the residual stream.
        mlp_norm_after, attention_norm_after: the norm that the block's outputs go through, if any.
        found: names of all tensors of a model, if the family isn't listed.
        task: the ending of its transformers class's name.
        keeps_apart: whether sequences that share a row can't see each other, given positions that restart with each.
        whole_groups: why its KV groups can't be pruned; empty if they can.
        no_low_rank: why its attention's matrices can't be given a low rank; empty if they can.
        no_sequence: why its blocks can't be refitted one after another; empty if they can.
        experts: the experts that some or all of its layers have in place of one MLP, if any.
        dense_layers: whether some of its layers have a plain MLP.
    """

    model_type: str
    architecture: str
    body: str = "model"
    head: str = "lm_head"
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    attention_norm_after: str | None = None
    attention_projections: tuple[str, ...] = ATTENTION
    adapted_attention: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_norm_after: str | None = None
    row_projections: tuple[str, ...] = ("gate_proj", "up_proj")
    row_parts: int = 1
    down_projection: str = "down_proj"
    biases: tuple[tuple[str | None, tuple[str, ...]], ...] = ()
    heads: Mapping[str, int] = field(default_factory=dict)
    twin: str | None = None
    any_heads: bool = True
    found: frozenset[str] = frozenset()
    task: str = CAUSAL
    keeps_apart: bool = True
    whole_groups: str = ""
    no_low_rank: str = ""
    no_sequence: str = ""
    experts: Experts | None = None
    dense_layers: bool = True

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

    def units(self, config: Mapping[str, Any]) -> Units:
        """The main units of a model with this ``config.json``: the neurons of its MLPs, or of its experts."""
        mlp = self._mlp(config)
        if self.experts is not None:
            return expert_neurons(config, mlp, self.experts)
        return neurons(config, mlp, *self._projections)

    def _beside_experts(self, config: Mapping[str, Any]) -> list[Units]:
        """In a mixture of experts, the neurons of the other MLPs, and the experts themselves."""
        if self.experts is None:
            return []
        made_of = config, self._mlp(config), self.experts
        shared = [shared_neurons(*made_of)] if self.experts.shared else []
        dense = [dense_neurons(*made_of, self._projections)] if self.dense_layers else []
        return [*shared, *dense, whole_experts(*made_of)]

    def _mlp(self, config: Mapping[str, Any]) -> Block:
        return self._block(config, self.mlp, self.mlp_norm, self.mlp_norm_after)

    @property
    def _projections(self) -> Projections:
        return self.row_projections, self.down_projection, self.row_parts

    def structures(self, config: Mapping[str, Any]) -> dict[str, Units]:
        """All kinds of units in a model with this ``config.json``, by name."""
        attention = self._block(config, self.attention, self.attention_norm, self.attention_norm_after)
        if self.whole_groups:
            groups = whole_groups(self.completed(config), attention)
        else:
            groups = kv_groups(self.completed(config), attention, self.attention_projections)
        return {units.kind: units for units in (self.units(config), *self._beside_experts(config), groups)}

    def _block(self, config: Mapping[str, Any], name: str, norm: str | None, norm_after: str | None) -> Block:
        multiplier = config.get("residual_multiplier") if self.found else None
        return Block(self.layers, name, norm, norm_after, 1.0 if multiplier is None else float(multiplier))

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The ``config.json`` with the number of key-value heads and the size of a head filled in."""
        stated = {**self.heads, **config}
        queries = int(stated["num_attention_heads"])
        groups = stated.get("num_key_value_heads") or queries
        head_dim = stated.get("head_dim") or stated["hidden_size"] // queries
        return {**config, "num_key_value_heads": groups, "head_dim": head_dim}

    def biased(self, config: Mapping[str, Any]) -> set[str]:
        """The projections that have a bias in a model with this ``config.json``."""
        own = {name for key, names in self.biases if key is None or config.get(key) for name in names}
        return own | {module.rpartition(".")[2] for module in config.get(OUTPUT_BIASES, ())}

    @property
    def attention_modules(self) -> list[str]:
        """Names within a layer of attention's projections: if these are separate, query, key, value, output."""
        return [f"{self.attention}.{name}" for name in self.attention_projections]

    def ranks(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Ranks of attention's low-rank projections under this ``config.json``; see ``structures.low_rank``."""
        return read_ranks(config, self.attention, self.attention_projections)

    def embedding_tensor(self) -> str:
        """Name of the table of token embeddings [vocabulary, hidden_size]."""
        return f"{self.embedding}.weight"

    def head_tensor(self) -> str:
        """Name of the head's weight [vocabulary, hidden_size]; a checkpoint whose head is tied may lack it."""
        return f"{self.head}.weight"

    def tensors(self, config: Mapping[str, Any]) -> set[str]:
        """Names of the tensors that a model with this ``config.json`` computes with, its head included; others in a
        checkpoint's files are ignored when it is loaded.
        """
        biased, ranks = self.biased(config), self.ranks(config)
        if self.found:
            factors = {
                f"{self.layers}.{layer}.{it}.weight"
                for name, row in ranks.items()
                for layer, _ in enumerate(row)
                for it in linear_modules(name, ranks)
            }
            return {*self.found, *factors, self.head_tensor()}
        modules = [(self.attention, name) for name in (*self.attention_projections, *self.head_norms)]
        modules += [(self.mlp, name) for name in (*self.row_projections, self.down_projection)]
        parts = [f"{norm}.weight" for norm in (self.attention_norm, self.mlp_norm)]
        for block, name in modules:
            linears = linear_modules(f"{block}.{name}", ranks)
            parts += [f"{linear}.weight" for linear in linears]
            parts += [f"{linears[-1]}.bias"] if name in biased else []
        layers = range(int(config["num_hidden_layers"]))
        of_layers = {f"{self.layers}.{layer}.{part}" for layer in layers for part in parts}
        return of_layers | {self.embedding_tensor(), f"{self.norm}.weight", self.head_tensor()}

    def body_of(self, model: nn.Module) -> nn.Module:
        """The decoder without its head: input_ids -> last_hidden_state, final norm included."""
        return model.get_submodule(self.body)

    def head_of(self, model: nn.Module) -> nn.Linear:
        """The projection to the vocabulary."""
        return cast("nn.Linear", model.get_submodule(self.head))

    def layers_of(self, model: nn.Module) -> list[nn.Module]:
        """The decoder layers, in order."""
        return list(model.get_submodule(self.layers).children())


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "Llama",
            biases=(("attention_bias", ATTENTION), ("mlp_bias", MLP)),
            twin="mistral",
            any_heads=False,
        ),
        Family("mistral", "Mistral", heads={"num_key_value_heads": 8}),
        Family("qwen2", "Qwen2", biases=((None, ATTENTION[:3]),), heads={"num_key_value_heads": 32}),
        Family(
            "qwen3",
            "Qwen3",
            head_norms=("q_norm", "k_norm"),
            biases=(("attention_bias", ATTENTION),),
            heads={"num_key_value_heads": 32, "head_dim": 128},
        ),
    )
}


# Keys of a config.json -> the kind of model that has them.
_OTHER_KINDS = {
    "audio_config": "a model of sound and text",
    "is_encoder_decoder": "an encoder-decoder",
}
# Further such keys, checked only for listed architectures.
_OTHER_THAN_LISTED = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "a mixture of experts")
# Keys by which attention also sees later tokens, so that no output predicts the next one -> the values that do this.
_SEEING_AHEAD: dict[str, tuple[object, ...]] = {"is_causal": (False,), "use_bidirectional_attention": (True, "all")}
# Architectures that could be taken for supported ones -> why they aren't.
_UNFIT = {
    "llama4_text": "routers multiply what its experts read, not what they make",
    "jetmoe": "its attention has experts too",
    "beam": "what its layers add is scaled by their number",
    "diffllama": "its attention computes with a layer's number",
    "minicpm3": "what its layers add is scaled by how many there are",
    "lara_mini": "its files have in one matrix what its linear attention has in four",
    "sarvam_moe": "its files have queries, keys and values in one matrix, which its attention has in three",
    "axk2": "its files have queries and their gates in one matrix, which its attention has in two",
    **dict.fromkeys(("deepseek_v4", "hy_v4", "gemma3n_text"), "several residual streams run through its layers"),
    **dict.fromkeys(
        ("inkling_text", "inkling2_text", "inkling2_loop_text"), "its shared experts are routed to as well"
    ),
    "recurrent_gemma": "its MLPs are half as wide as intermediate_size says",
    "falcon_h1": "its model, not its layers, makes the scales of their state-space blocks",
    "olmo_hybrid": "transformers makes no layer of it alone",
    "nemotron_h": "a layer has an MLP or attention, not both",
    **dict.fromkeys(("zamba", "zamba2"), "its layers share their MLPs"),
    **dict.fromkeys(("gpt2", "openai-gpt"), "its matrices are transposed (Conv1D)"),
}
# Keys that files of hunyuan_v1_moe state for each layer.
_LISTED = ("moe_topk", "moe_intermediate_size")
_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def normalized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with ``intermediate_size`` and ``num_hidden_layers``, whatever its architecture calls them, and
    with one number of chosen experts and one width of experts in place of lists of equal ones.
    """
    return _with_width(_without_lists(_with_layers(config)))


def _with_layers(config: Mapping[str, Any]) -> Mapping[str, Any]:
    if "num_hidden_layers" in config or OTHER_LAYERS not in config:
        return config
    return {**config, "num_hidden_layers": config[OTHER_LAYERS]}


def _without_lists(config: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(config.get(_LISTED[0]), list):
        return config
    listed = {key: config[key] for key in _LISTED if isinstance(config.get(key), list)}
    return {**config, **{key: them[0] for key, them in listed.items() if them and them == them[:1] * len(them)}}


def _with_width(config: Mapping[str, Any]) -> dict[str, Any]:
    names = tuple[str, ...](() if config.get("num_local_experts") else OTHER_WIDTHS)
    names += () if "intermediate_size" in config else (*OLDER_WIDTHS, WIDTHS[0])
    width = next((config[key] for key in names if key in config), None)
    return dict(config) if width is None else {**config, "intermediate_size": width}


def refuse_other_kinds(config: Mapping[str, Any], where: str) -> None:
    """Refuse models that aren't decoders of a supported kind.

    Raises:
        UserError: saying what the model is, or what its config.json lacks.
    """
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{where}: model_type is {config.get('model_type')!r}; it must name an architecture")
    if unfit := _UNFIT.get(str(config.get("model_type"))):
        raise not_supported(config, where, unfit)
    kinds = _OTHER_KINDS | (_OTHER_THAN_LISTED if config.get("model_type") in FAMILIES else {})
    found = next((key for key in kinds if config.get(key) not in (None, False)), None)
    if found:
        raise not_supported(config, where, f"it is {kinds[found]} ({found})")
    ahead = next((key for key, values in _SEEING_AHEAD.items() if config.get(key) in values), None)
    if ahead:
        raise not_supported(config, where, f"its tokens see those that follow ({ahead} {config[ahead]!r})")
    missing = [key for key in _NEEDED if key not in config]
    if missing and config.get("model_type") not in FAMILIES:
        raise not_supported(config, where, f"config.json has no {', '.join(missing)}")


def not_supported(config: Mapping[str, Any], where: str, why: str) -> UserError:
    """The error to raise for a model that can't be pruned."""
    return UserError(
        f"{where}: model_type {str(config.get('model_type'))!r} is not supported: {why}. Pruned are "
        f"{', '.join(sorted(FAMILIES))} and other decoders whose layers have one MLP, or gated experts "
        "(hfprune_dist/checkpoints/README.md lists those that are tested)"
    )
