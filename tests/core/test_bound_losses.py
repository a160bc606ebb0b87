import pytest
import torch

from hfprune_dist.core.bound_losses import Batch, bind
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.core.head import Rows
from hfprune_dist.core.losses import SIGN_TOKENS


@pytest.mark.parametrize("criterion", ["entropy", "cross_entropy", "fisher", "fisher_signs"])
def test_neither_chunks_nor_micro_batches_change_what_a_loss_draws(criterion):
    windows, tokens, vocabulary = (7, 3), 2 * SIGN_TOKENS + 20, 40
    input_ids = torch.randint(vocabulary, (2, tokens), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2 * tokens, vocabulary, generator=torch.Generator().manual_seed(1)).double()

    def gradients(batches, chunk):
        for places in batches:
            batch = Batch(input_ids[places], [windows[place] for place in places], vocabulary, 0)
            bound = bind(CRITERIA[criterion].loss, batch)
            some = logits.view(2, tokens, vocabulary)[places].flatten(0, 1)
            for start in range(0, len(some), chunk):
                rows = slice(start, min(start + chunk, len(some)))
                yield bound(Rows(some[rows].clone(), rows))[1]

    whole = torch.cat(list(gradients([[0, 1]], 2 * tokens)))
    for chunk in (1, 50, SIGN_TOKENS, tokens + 1):
        assert torch.equal(torch.cat(list(gradients([[0, 1]], chunk))), whole)
        assert torch.equal(torch.cat(list(gradients([[0], [1]], chunk))), whole)
