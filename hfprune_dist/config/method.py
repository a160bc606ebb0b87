"""Pruning methods: how scores are turned into a smaller checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from hfprune_dist.config.section import NumberOrShare, Positive, PositiveOrAuto, Section, explained_by
from hfprune_dist.methods import CRITERIA, CriterionName, MethodCriterion
from hfprune_dist.structures import EXPERTS, KV_GROUPS, NEURONS, TOGETHER, Structure

Allocation = Literal["uniform", "plain", "local", "global", "standardized", "searched", "low_rank"]
Refit = Literal["none", "bias", "dense", "layerwise", "block"]
Effort = Literal["quick", "thorough"]
EngineName = Literal["vllm", "llama.cpp", "openvino", "mlx", "ctranslate2"]


def _in_order(structures: list[Structure]) -> list[Structure]:
    if len(set(structures)) < len(structures) or (
        structures != [EXPERTS] and not {NEURONS} <= {*structures} <= {*TOGETHER}
    ):
        raise ValueError(
            f"must be {EXPERTS} alone, or {NEURONS}, beside which there may be {' and '.join(TOGETHER[1:])}"
        )
    return [kind for kind in TOGETHER if kind in structures] or structures


# What is pruned, in a fixed order whatever order it is given in.
Structures = Annotated[list[Structure], AfterValidator(_in_order)]


class Method(Section):
    """How scores are turned into a smaller checkpoint. ``configs/methods`` has the methods shipped with the project."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["criterion"]}, {"required": ["prunes_in"]}]})

    criterion: MethodCriterion | None = None
    """The score that decides which units are kept: those that score highest. lorap, which the prune stage computes,
    also keeps the 1 % that score lowest. null if ``prunes_in`` is recovery."""
    prunes_in: Literal["calibration", "recovery"] = "calibration"
    """When units are scored. calibration: in a pass over the calibration windows, before recovery. recovery: by LoRA's
    own gradients while it trains on the instruction pairs, in the usual number of steps; units are masked meanwhile and
    cut at the end (LoRAPrune). This requires allocation: local, and neither criterion nor refit."""
    structures: Structures = Field(default=[NEURONS])
    """What is pruned. neurons: channels of MLPs. In addition: kv_groups, the key-value heads of attention with the
    query heads that read them; layers, whole layers. Neurons and groups are scored; the effect of removing a layer is
    measured. kv_groups require an allocation other than uniform and low_rank; layers require plain or searched. Or only
    experts: whole experts of a mixture of experts, which requires allocation: uniform, and no refit."""
    allocation: Allocation = "uniform"
    """The shape of the pruned model. uniform: the same width, or number of experts, in all layers. plain: the same
    numbers of KV groups and neurons in all layers, perhaps fewer layers; such shapes are measured on calibration
    windows, and the one closest to the dense model is taken. local: every layer that isn't protected loses the same
    share of its neurons and of its KV groups; nothing is measured. global: units of all layers compete by score per
    parameter, those of KV groups doubled; scores that aren't in nats are first divided by their layer's mean.
    standardized: they compete by score minus the layer's mean, in its standard deviations, whatever their size.
    searched: shapes around that of global are measured, and plain ones and some without whole layers; the closest is
    taken. low_rank: one pass, layer by layer, scores and prunes: attention's matrices become products of two low-rank
    ones, and all layers get the same width. If layers differ, or with low_rank, loading the checkpoint needs
    trust_remote_code or this package."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.2
    """global, standardized, searched: the smallest share of its neurons that a layer may keep; 0 means one neuron."""
    protect_first: NumberOrShare = 0
    """local, global, standardized, searched: number of layers at the beginning of the model that lose nothing; or, if
    it is between 0 and 1, their share of all layers, rounded to the nearest whole number of layers."""
    protect_last: NumberOrShare = 0
    """local, global, standardized, searched: as protect_first, for layers at the end of the model."""
    adapts: bool = False
    """Whether the method omits what an architecture doesn't allow: KV groups that can't be removed one by one are kept,
    and a refit that works block by block (layerwise, block) becomes dense; a mixture of experts for which that isn't
    enough gets no row. false: such a model is refused."""
    tensor_parallel: Positive = 1
    """Number of devices that each layer will be split over: the number of KV groups that a layer keeps, and the width
    of a layer that loses neurons, are multiples of it. Has an effect only if structures includes kv_groups."""
    refit: Refit = "none"
    """New values for the weights that stay. bias: biases of output projections that make up for the removed units' mean
    output on the dense model's activations; loading the checkpoint then needs trust_remote_code or this package, unless
    the architecture has these biases. The others solve least squares for down_proj, so that the kept neurons take over
    from the removed ones. dense: fitted to the dense MLP's outputs, on the dense model's activations. layerwise: layer
    by layer, on the pruned model's own activations; the target lies halfway between the dense MLP's output there and
    the output that would restore the dense model's hidden states. block: as layerwise, then Gauss-Newton steps on
    gate_proj, up_proj and down_proj together; takes minutes, not seconds."""
    effort: Effort = "thorough"
    """How far a search and a refit by least squares go. quick: layers are ordered by what dropping each alone costs;
    of shapes, those with every other number of layers and more than half of the KV groups are measured, after fits on
    half of the calibration windows, and of those that come within 7 % of the closest, the one with the fewest layers
    is taken; the refit sees the calibration windows, and ``block`` takes one Gauss-Newton step of one to four
    iterations: the dense MLPs' width divided by that of what is left. thorough: layers are measured again after each
    that goes; the closest shapes are fitted layer by layer before one is taken; the refit also sees a copy of each
    window in which half of the tokens are resampled from the dense model's distribution of the next token, which brings
    some of what more text would; ``block`` takes a step of four iterations, and one of six on all windows; and after
    ``layerwise`` and ``block``, the weights of all norms are refitted: a factor for each channel, found by a few
    steps that lower the divergence from the dense model's distribution of the next token."""
    multiple_of: PositiveOrAuto = 1
    """Round intermediate_size, or the number of experts, to a multiple of this: 64 or 128 suit GPUs; for experts,
    take the number of devices that share them. auto: the largest of 256, 128, 64 and 32 of which one step in all layers
    is at most 1.25 % of the model's parameters; if there is none, 32 for models whose intermediate_size is at least
    1,024, otherwise 1; always 1 for experts."""
    for_engines: list[EngineName] = Field(default=[])
    """Engines that must load the result, if they have its family: widths suit their kernels and quantized weights, and
    plain shapes keep their KV groups where one ignores head_dim; a shape that one still wouldn't load is refused."""

    @property
    def refits_weights(self) -> bool:
        """Whether matrices, not biases alone, get new values."""
        return self.refit not in ("none", "bias")

    @property
    def without_effect(self) -> set[str]:
        """Names of settings that have no effect, given the others."""
        protects = self.allocation in ("local", "global", "standardized", "searched")
        idle = set() if protects else {"floor", "protect_first", "protect_last"}
        idle |= {"floor"} if self.allocation == "local" else set()
        idle |= set() if KV_GROUPS in self.structures else {"tensor_parallel"}
        measures_or_fits = self.allocation in ("plain", "searched") or self.refits_weights
        return idle if measures_or_fits else idle | {"effort"}

    @property
    def scored_before(self) -> frozenset[CriterionName]:
        """The scores that a calibration pass computes for it."""
        return frozenset(CRITERIA.keys() & {self.criterion})

    @property
    def student_chosen_by(self) -> CriterionName | None:
        """The criterion whose scores choose the student on which this method's are computed; None without a student."""
        return next((CRITERIA[name].student_by for name in self.scored_before), None)


class PruneConfig(Section):
    """Settings that override those of every method; null keeps the method's own value (see ``Method``)."""

    model_config = ConfigDict(json_schema_extra=explained_by(Method))

    criterion: MethodCriterion | None = None
    structures: Structures | None = None
    allocation: Allocation | None = None
    floor: Annotated[float, Field(ge=0, le=1)] | None = None
    protect_first: NumberOrShare | None = None
    protect_last: NumberOrShare | None = None
    adapts: bool | None = None
    tensor_parallel: Positive | None = None
    refit: Refit | None = None
    effort: Effort | None = None
    multiple_of: PositiveOrAuto | None = None
    for_engines: list[EngineName] | None = None
