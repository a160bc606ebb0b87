"""Gram matrices of experts that are given many tokens, few or none, drawn together with scales of activations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import Ranks

from hfprune_dist.core.least_squares import RIDGES
from hfprune_dist.distributed.sums import GramSums, Split, is_held_out
from hfprune_dist.errors import UserError
from hfprune_dist.refit.least_squares_fit import solve

EXPERTS, OUTPUTS = 3, 4
# Scales that routers and gates give to an expert's activations.
SCALES = st.sampled_from([1e-12, 1e-6, 1e-3, 0.1, 1.0, 10.0])


@st.composite
def read(draw):
    """Draw each expert's inputs [tokens, size] for each micro-batch; the first token is an ordinary one."""
    size, generator = draw(st.integers(1, 6)), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    batches = [
        [torch.randn(draw(st.integers(0, 9)), size, generator=generator) * draw(SCALES) for _ in range(EXPERTS)]
        for _ in range(draw(st.integers(1, 9)))
    ]
    batches[0][0] = torch.cat([torch.ones(1, size), batches[0][0]])
    return batches


SPLITS = {count: Split.of([torch.ones(2, 5)] * count) for count in range(10)}


def grams_of(batches, ranks):
    """Return each expert's Gram matrices, equal on every rank; experts read some of a micro-batch's 10 tokens."""

    def work(world):
        sums = [GramSums(0, batches[0][0].shape[1], SPLITS[len(batches)], world) for _ in range(EXPERTS)]
        for index in range(world.rank, len(batches), world.size):
            for of_expert, vectors in zip(sums, batches[index], strict=True):
                of_expert.add(index, vectors)
        return [it.means() for it in sums]

    found = Ranks(ranks).run(work)
    for others in found[1:]:
        for ours, theirs in zip(found[0], others, strict=True):
            assert torch.equal(ours.fitted_DD, theirs.fitted_DD) and torch.equal(ours.held_out_DD, theirs.held_out_DD)
    return found[0]


@given(read(), st.integers(1, 5))
@settings(max_examples=30)
def test_means_are_those_of_the_tokens_on_any_number_of_ranks(batches, ranks):
    split = SPLITS[len(batches)]
    for expert, grams in enumerate(grams_of(batches, ranks)):
        both = [(False, grams.fitted_DD, split.fitted_tokens), (True, grams.held_out_DD, split.held_out_tokens)]
        for held_out, gram_DD, tokens in both if split.held_out_tokens else both[:1]:
            parts = [it[expert] for i, it in enumerate(batches) if is_held_out(i, len(batches)) == held_out]
            vectors = torch.cat(parts).double()
            expected = vectors.T @ vectors / tokens
            assert (gram_DD - expected).norm() <= 1e-6 * expected.norm()


@given(read(), st.integers(0, 99))
@settings(max_examples=50)
def test_every_expert_gets_a_weight_that_is_no_worse(batches, seed):
    generator = torch.Generator().manual_seed(seed)
    size = batches[0][0].shape[1]
    kept = torch.randperm(size, generator=generator)[: 1 + seed % size].sort().values
    weight_CD = torch.randn(OUTPUTS, size, generator=generator)
    for grams in grams_of(batches, 1):
        solution = solve(weight_CD, grams, kept, expert=True)
        assert solution.whole_CK.isfinite().all() and solution.energy >= 0
        assert solution.fit.error_after <= solution.fit.error_before + 1e-6
        if not grams.whole().any():
            assert torch.equal(solution.whole_CK, weight_CD[:, kept])
        if not (grams.fitted_DD.any() and grams.held_out_DD.any()):
            assert solution.fit.ridge == RIDGES[-1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_not_finite_names_the_layer(value, ranks):
    batches = [[torch.ones(2, 3)] * EXPERTS, [torch.ones(2, 3), torch.full((1, 3), value), torch.ones(0, 3)]]
    with pytest.raises(UserError, match="activations of layer 0: values are NaN or infinite"):
        grams_of(batches, ranks)
