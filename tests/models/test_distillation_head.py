"""The head that makes a model output its divergence from the dense model."""

import pytest
import torch
from host_reads import HostReads
from tiny import FAMILY, tiny_model

from hfprune_dist.core.losses import summed_divergence
from hfprune_dist.models.after_head import DistillingHead


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_the_first_rows_count_and_no_gpu_would_be_waited_for(rows):
    model = tiny_model().requires_grad_(False)
    weight_VC = model.lm_head.weight
    hidden_BTC, dense_BTC = torch.randn(2, 3, 5, model.config.hidden_size).unbind()
    alone_NC = hidden_BTC[:rows].flatten(0, 1).requires_grad_()
    expected = summed_divergence(alone_NC, dense_BTC[:rows].flatten(0, 1), weight_VC, None)
    expected.backward()
    head = DistillingHead(model, FAMILY)
    head.expect(dense_BTC, rows)
    hidden_BTC.requires_grad_()
    with HostReads() as reads:
        divergence = model.lm_head(hidden_BTC)
        divergence.backward()
    assert torch.equal(divergence, expected)
    assert torch.equal(hidden_BTC.grad[:rows].flatten(0, 1), alone_NC.grad) and not hidden_BTC.grad[rows:].any()
    assert reads.names == []
