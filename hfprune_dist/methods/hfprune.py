"""HFPrune: neurons with little influence on the entropy of the model's own predictions go (arXiv 2603.08083).

H = -sum_v p_v log p_v is the entropy of the next-token distribution p, averaged over a window's tokens. It needs no
labels and no teacher. A neuron's score is the sum over tokens of |h * dH/dh|: how much H changes, to first order, when
the neuron's activation h is set to 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfprune_dist.core.criterion import Criterion, Loss
from hfprune_dist.structures import ALL_KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from hfprune_dist.core.head import Batch, LogitGradient


def entropy(_batch: Batch) -> LogitGradient:
    """Return a function of some tokens' logits z: H of each token [tokens], and dH/dz [tokens, vocabulary]."""
    from hfprune_dist.core.losses import entropy_gradient

    return lambda rows: entropy_gradient(rows.logits_NV)


def absolute(effects_NU: Tensor) -> Tensor:
    """|h * dL/dh| [tokens, units], h * dL/dh added up over a unit's channels."""
    return effects_NU.abs()


ENTROPY = Loss("entropy", entropy)

CRITERIA = (Criterion("entropy", ALL_KINDS, "effects", absolute, loss=ENTROPY),)
