"""The tensors of a model's modules, and those in a checkpoint's files that each is made from; without torch.

Files and modules mostly have the same tensors under the same names. But some blocks have other names in files, and some
files have one tensor per expert where modules hold all experts of a layer in one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfprune_dist.checkpoints.text_decoder import has_vision

if TYPE_CHECKING:
    from hfprune_dist.checkpoints.checkpoint import Checkpoint

# The beginning of names in modules, and that of the same names in files; # stands for the number of a layer.
Pair = tuple[str, str]


def _in_layers(*pairs: Pair, layers: str = "model.layers.#.") -> tuple[Pair, ...]:
    return tuple((f"model.layers.#.{modules}", f"{layers}{files}") for modules, files in pairs)


_OF_GATE = "mlp.gate.e_score_correction_bias"
_SINKS = "self_attn.sinks"
# A text decoder alone, as transformers saves it after it was loaded from a model of images and text.
_TAKEN_OUT = (("model.", "model.language_model."),)
# model_type -> beginnings of its names that differ; the first that matches counts.
_RENAMED: dict[str, tuple[Pair, ...]] = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "apertus1p5_text"), _TAKEN_OUT),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _in_layers(("mlp.", "block_sparse_moe."))),
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"),
        _in_layers(
            ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"),
            ("block_sparse_moe.experts.down_proj", "block_sparse_moe.output_linear.weight"),
            ("block_sparse_moe.router.", "block_sparse_moe.router.layer."),
        ),
    ),
    "gpt_neox": (("lm_head.", "embed_out."),),
    "exaone": (
        ("model.embed_tokens.", "transformer.wte."),
        ("model.norm.", "transformer.ln_f."),
        *_in_layers(
            ("self_attn.o_proj.", "attn.attention.out_proj."),
            ("self_attn.", "attn.attention."),
            ("input_layernorm.", "ln_1."),
            ("post_attention_layernorm.", "ln_2."),
            ("mlp.gate_proj.", "mlp.c_fc_0."),
            ("mlp.up_proj.", "mlp.c_fc_1."),
            ("mlp.down_proj.", "mlp.c_proj."),
            layers="transformer.h.#.",
        ),
    ),
    "axk1": _in_layers(("mlp.post_mlp_layernorm.", "post_mlp_layernorm.")),
    "bailing_hybrid": (
        ("model.embed_tokens.", "model.word_embeddings."),
        *_in_layers(
            (_OF_GATE, "mlp.gate.expert_bias"),
            *((f"self_attn.forget_gate.{part}", f"attention.{part}") for part in ("f_proj.", "dt_bias", "A_log")),
            ("self_attn.o_proj.", "attention.dense."),
            ("self_attn.", "attention."),
        ),
    ),
    "ernie4_5_moe": _in_layers(("mlp.gate.moe_statics.", "mlp.moe_statics.")),
    "exaone_moe": _in_layers((_OF_GATE, "mlp.e_score_correction_bias")),
    "flint": _in_layers((_SINKS, "self_attn.softmax_offset")),
    "hy_v3": _in_layers(
        ("mlp.gate.", "mlp.router.gate."),
        ("mlp.e_score_correction_bias", "mlp.expert_bias"),
        ("mlp.shared_experts.", "mlp.shared_mlp."),
    ),
    "kimi_linear": _in_layers(
        *(
            (f"self_attn.forget_gate.{part}", f"self_attn.{part}")
            for part in ("f_a_proj.", "f_b_proj.", "dt_bias", "A_log")
        ),
        ("mlp.", "block_sparse_moe."),
    ),
    "kolibri1": _in_layers(
        (_OF_GATE, "moe.router.expert_bias"),
        ("post_self_attn_layernorm.", "post_attn_norm."),
        ("post_mlp_layernorm.", "post_ffn_norm."),
    ),
    "laguna": _in_layers(
        (_OF_GATE, "mlp.experts.e_score_correction_bias"), ("mlp.shared_experts.", "mlp.shared_expert.")
    ),
    "lfm3": _in_layers(("self_attn.g_proj.", "self_attn.gate_proj.")),
    "mimo_v2_flash": _in_layers((_SINKS, "self_attn.attention_sink_bias")),
    "phimoe": _in_layers(("mlp.router.", "block_sparse_moe.gate."), ("mlp.", "block_sparse_moe.")),
}
# The same for text decoders inside models of images and text.
_OF_DECODERS = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    *((f"model.language_model.{part}.", f"model.{part}.") for part in ("embed_tokens", "layers", "norm")),
)


@dataclass(frozen=True)
class StoredNames:
    """Beginnings of names that differ between modules and files."""

    pairs: tuple[Pair, ...] = ()

    @classmethod
    def found(cls, config: Mapping[str, Any], names: Iterable[str]) -> StoredNames:
        """The names of a checkpoint with this ``config.json``, whose files have tensors with these ``names``."""
        pairs = _OF_DECODERS if has_vision(config) else _RENAMED.get(str(config.get("model_type")), ())
        every = {_general(name)[0] for name in names}
        return cls(tuple(pair for pair in pairs if any(name.startswith(pair[1]) for name in every)))

    def in_modules(self, name: str) -> str:
        """The name in a model of a tensor in the files."""
        return _renamed(name, ((its, ours) for ours, its in self.pairs))

    def in_files(self, name: str) -> str:
        """The name in the files of a model's tensor."""
        return _renamed(name, self.pairs)


def _general(name: str) -> tuple[str, str]:
    """A name with # in place of its first number, which is a layer's; and that number."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (f"{name[: number.start()]}#{name[number.end() :]}", number[0]) if number else (name, "#")


def _renamed(name: str, pairs: Iterable[Pair]) -> str:
    general, number = _general(name)
    for before, after in pairs:
        if general.startswith(before):
            return (after + general.removeprefix(before)).replace("#", number, 1)
    return name


# For files in which all tensors have the same names as in modules.
SAME = StoredNames()

# Convolutions of linear attention, which some files have as separate tensors.
_JOINED, _WHOLE = (".q_conv1d.weight", ".k_conv1d.weight", ".v_conv1d.weight"), ".conv1d.weight"


# What a tensor of a module is made from, by names: for each expert, the matrices to concatenate, which are then stacked
# along a new first dimension; or, without experts, those of one matrix.
Sources = tuple[tuple[str, ...], ...]


def module_tensors(checkpoint: Checkpoint, layer: int | None = None) -> dict[str, Sources]:
    """Name in modules -> what the tensor is made from, for the whole model, or only for one layer if it is given."""
    prefix, experts = f"{checkpoint.family.layers}.", checkpoint.family.experts
    found: dict[str, Sources] = {}
    if experts is not None and experts.has_own_tensors:
        for sparse in experts.layers if layer is None else {layer} & {*experts.layers}:
            *rows, down = experts.tensors
            for module, patterns in (("gate_up_proj", rows), ("down_proj", [down])):
                found[f"{prefix}{sparse}.{experts.module}.{module}"] = tuple(
                    tuple(f"{prefix}{sparse}.{pattern.format(expert)}" for pattern in patterns)
                    for expert in range(experts.count)
                )
    stacked = {name for sources in found.values() for names in sources for name in names}
    wanted = "" if layer is None else f"{prefix}{layer}."
    found |= {name: ((name,),) for name in checkpoint.tensors if name.startswith(wanted) and name not in stacked}
    for first in [name for name in found if name.endswith(_JOINED[0])]:
        names = tuple(first.removesuffix(_JOINED[0]) + part for part in _JOINED)
        for name in names:
            del found[name]
        found[first.removesuffix(_JOINED[0]) + _WHOLE] = (names,)
    return found
