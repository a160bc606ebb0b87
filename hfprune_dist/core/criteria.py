"""Table of the criteria by which units are scored; any module can import it, since it doesn't import torch.

A unit is what pruning removes as a whole (``hfprune_dist.structures``): one or more channels of the vector ``h`` that a
layer's output projection reads. README.md in this folder explains how to add a criterion to ``CRITERIA``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class Loss:
    """A function of a model's outputs, whose gradient scores units. Criteria with the same loss share one backward.

    Attributes:
        name: name in reports.
        reduction: whether the mean or the sum over a window's tokens is differentiated.
        of: the model whose outputs it takes: the dense one, or a student that lacks some units, with the dense model as
            its teacher. Units are scored at the activations of that same model.
        unlabelled: number of tokens at the end of a window that have no loss.
        in_nats: whether its mean per token is in nats and worth reporting.
    """

    name: str
    reduction: Literal["mean", "sum"]
    of: Literal["dense", "student"] = "dense"
    unlabelled: int = 0
    in_nats: bool = True

    def terms(self, tokens: int) -> int:
        """Return the number of tokens that have a loss, in a window of ``tokens`` tokens."""
        return tokens - self.unlabelled


# The quantity that a criterion adds up; see ``Criterion``.
Summed = Literal[
    "gradient",
    "activation",
    "moments",
    "routed_output",
    "coupled_product",
    "weight_gradient",
    "nothing",
]


@dataclass(frozen=True)
class Criterion:
    """A score per unit: a sum over all tokens of the calibration pass, sometimes transformed afterwards.

    Attributes:
        name: name in the configuration and in the artifact.
        description: one line, with the source.
        summed: the quantity that is summed. Per token: h * dL/dh, added up over the unit's channels ("gradient"); h of
            each channel separately ("activation"); h and h^2 of each channel, adjacent and signed ("moments"); or, for
            an expert that is given the token, the norm of its output times its routing weight, followed by 1
            ("routed_output"). Per window: W * dL/dW added up over a neuron's three weights at a hidden channel, of
            which the mean over hidden channels is taken ("coupled_product"). Over the whole pass: dL/dW of the weights
            that units own, signed, with no number per unit ("weight_gradient"). Or "nothing": no calibration pass.
        loss: L, if a gradient is summed.
        reduction: whether absolute values or squares are summed.
        is_its_sum: whether the sum is the score; otherwise ``core.scores`` turns it into one.
        needs_moments: whether the score also depends on the layer's ``SecondMoments``, which cost a second pass.
        in_nats: whether scores estimate KL divergence per token, a unit of measure that all layers share.
        in_deviations: whether scores are means over a unit's channels, in standard deviations of its layer's channels.
        student_of: for the loss of a student, the criterion whose scores from an earlier pass determine the neurons it
            lacks.
    """

    name: str
    description: str
    summed: Summed
    loss: Loss | None = None
    reduction: Literal["abs", "square"] = "abs"
    is_its_sum: bool = True
    needs_moments: bool = False
    in_nats: bool = False
    in_deviations: bool = False
    student_of: str | None = None

    def __post_init__(self) -> None:
        of_gradients = ("gradient", "coupled_product", "weight_gradient")
        assert (self.summed in of_gradients) == (self.loss is not None), self.name
        is_of_student = self.loss is not None and self.loss.of == "student"
        assert is_of_student == (self.student_of is not None) and not (is_of_student and self.is_of_expert_neurons)

    @property
    def has_sums_of_units(self) -> bool:
        """Whether a pass adds up numbers for units or for their channels."""
        return self.summed not in ("weight_gradient", "nothing")

    @property
    def is_of_neurons_alone(self) -> bool:
        """Whether only neurons have scores: rows of attention's projections share no common channel."""
        return self.summed == "coupled_product"

    @property
    def is_of_expert_neurons(self) -> bool:
        """Whether neurons of experts have scores. Each expert sees only its own tokens, so the criterion must not sum
        products of tokens, nor anything about whole weights.
        """
        return self.summed in ("gradient", "activation", "nothing") and not self.needs_moments

    @property
    def is_of_whole_experts_alone(self) -> bool:
        """Whether only whole experts have scores, because the criterion is about their outputs."""
        return self.summed == "routed_output"

    @property
    def is_of_whole_experts(self) -> bool:
        """Whether whole experts have scores."""
        return self.is_of_whole_experts_alone or self.is_of_expert_neurons

    @property
    def needs_weight_products(self) -> bool:
        """Whether it needs weights times their gradients in each window (``core.weight_products``)."""
        return self.summed == "coupled_product"

    @property
    def needs_weight_gradients(self) -> bool:
        """Whether it needs gradients of weights, each summed over the whole pass."""
        return self.summed == "weight_gradient"

    @property
    def is_of_channels(self) -> bool:
        """Whether each channel has sums of its own, which ``core.scores`` combines into one score per unit."""
        return self.summed in ("activation", "moments")

    def sums_of_unit(self, channels: int) -> int:
        """Return the number of sums that a unit with this many channels has."""
        of_each = 2 if self.summed in ("moments", "routed_output") else 1
        return of_each * channels if self.is_of_channels else of_each


def losses_of(criteria: Iterable[Criterion]) -> list[Loss]:
    """Return the losses of these criteria, each once; each takes a backward, and those of a student another forward."""
    return list(dict.fromkeys(criterion.loss for criterion in criteria if criterion.loss is not None))


def lacking(units: int, share: float) -> int:
    """Return the number of a layer's units that a student lacks."""
    return round(share * units)


ENTROPY = Loss("entropy", "mean")
CROSS_ENTROPY = Loss("cross_entropy", "mean", unlabelled=1)
# Fisher losses stay sums: the gradients of different tokens' losses are then uncorrelated terms of one sum, and the
# expectation of its square is that of the sum of their squares.
SAMPLED_LABEL = Loss("sampled_label", "sum")
RANDOM_SIGNS = Loss("random_signs", "sum", in_nats=False)
LABELS_AND_TEACHER = Loss("labels_and_teacher", "mean", of="student")

# A Fisher score is sum_s (h_s * d/dh_s sum_t log p(y_t))^2 over the tokens s of a window. Attention mixes tokens: the
# gradient at token s holds the effect on every later token t. With labels drawn independently, terms of different t
# are uncorrelated, so the expected score is sum_s sum_t E[(h_s * dlog p(y_t)/dh_s)^2]: twice the second-order KL of
# removing the unit at one token, added up over tokens. Products between tokens s of the unit are left out.
CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "entropy",
            "sum over tokens of |h * dH/dh|, H a window's mean entropy (HFPrune, arXiv 2603.08083)",
            "gradient",
            ENTROPY,
        ),
        Criterion(
            "cross_entropy",
            "sum over tokens of |h * dCE/dh|, CE a window's mean over the text's next tokens",
            "gradient",
            CROSS_ENTROPY,
        ),
        Criterion(
            "fisher",
            "sum over tokens of (h * dlog p(y)/dh)^2, labels y drawn from the model's p",
            "gradient",
            SAMPLED_LABEL,
            "square",
        ),
        Criterion(
            "fisher_signs",
            "the same expectation as fisher, from random signs on the square root of p instead of labels",
            "gradient",
            RANDOM_SIGNS,
            "square",
        ),
        Criterion(
            "activation",
            "norm of h over tokens times the norm of the neuron's down_proj column",
            "activation",
            reduction="square",
            is_its_sum=False,
        ),
        Criterion(
            "activation_l1",
            "norm of h over tokens times the sum of the absolute weights in the neuron's down_proj column (Wanda-sp, "
            "arXiv 2312.11983)",
            "activation",
            reduction="square",
            is_its_sum=False,
        ),
        Criterion(
            "fluctuation",
            "variance of h over tokens times the squared norm of the neuron's down_proj column, in standard "
            "deviations of its layer (FLAP's WIFV, arXiv 2312.11983)",
            "moments",
            is_its_sum=False,
            in_deviations=True,
        ),
        Criterion(
            "surgeon",
            "nats per token that removing the neuron costs after all cheaper ones, when the others are refitted "
            "(K-FAC, arXiv 2312.17244)",
            "gradient",
            RANDOM_SIGNS,
            "square",
            needs_moments=True,
            in_nats=True,
            is_its_sum=False,
        ),
        Criterion(
            "weight_taylor",
            "sum over the weights that the unit owns of |W * dCE/dW|, CE the mean over all windows (LLM-Pruner's "
            "param_first, arXiv 2305.11627)",
            "weight_gradient",
            CROSS_ENTROPY,
            is_its_sum=False,
        ),
        Criterion(
            "coupled_taylor",
            "sum over windows of the mean over hidden channels of |W * dCE/dW, added up over a neuron's three weights "
            "there|, CE a window's mean (SDMPrune's start, arXiv 2506.11120)",
            "coupled_product",
            CROSS_ENTROPY,
        ),
        Criterion(
            "coupled_taylor_distilled",
            "the same in a student without the neurons that score least by that, of a loss on labels and on the dense "
            "model's distribution (SDMPrune, arXiv 2506.11120)",
            "coupled_product",
            LABELS_AND_TEACHER,
            student_of="coupled_taylor",
        ),
        Criterion(
            "reap",
            "mean over the tokens that an expert is given of the norm of its output times its routing weight (REAP, "
            "arXiv 2510.13999)",
            "routed_output",
            is_its_sum=False,
        ),
        Criterion("magnitude", "norm of the neuron's weights", "nothing", is_its_sum=False),
        Criterion("random", "a random order, the floor of any comparison", "nothing", is_its_sum=False),
    )
}

# Type of a criterion's name, for configurations.
if TYPE_CHECKING:
    CriterionName = str
else:
    CriterionName = Literal[tuple(CRITERIA)]

# Criteria by which the prune stage itself scores neurons, layer by layer, in the model as pruned so far.
SCORED_WHILE_PRUNED = {
    "lorap": "norms of the neuron's weights times those of what they read, added up; the hundredth that scores lowest "
    "stays all the same (the code of LoRAP, ICML 2024)",
    "lorap_highest": "as lorap, but all that stay are those that score highest",
}

# Type of the names of all criteria that a method can use.
if TYPE_CHECKING:
    MethodCriterion = str
else:
    MethodCriterion = Literal[(*CRITERIA, *SCORED_WHILE_PRUNED)]
