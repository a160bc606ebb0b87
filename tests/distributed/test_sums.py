"""Gram matrices of experts that are given many tokens, few or none, drawn together with scales of activations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import Ranks

from hfprune_dist.core.gram import BLOCK
from hfprune_dist.distributed.sums import GramSums, is_held_out, micro_batches_of, windows_held_out
from hfprune_dist.errors import UserError

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


def grams_of(batches, ranks):
    """Return each expert's Gram matrices, equal on every rank; experts read some of a micro-batch's tokens."""

    def work(world):
        sums = [GramSums(0, batches[0][0].shape[1], len(batches), world) for _ in range(EXPERTS)]
        for index in range(world.rank, len(batches), world.size):
            for of_expert, vectors in zip(sums, batches[index], strict=True):
                of_expert.add(index, vectors)
        return GramSums.of_all_ranks(sums)

    found = Ranks(ranks).run(work)
    for others in found[1:]:
        for ours, theirs in zip(found[0], others, strict=True):
            assert torch.equal(ours.fitted_DD, theirs.fitted_DD) and torch.equal(ours.held_out_DD, theirs.held_out_DD)
    return found[0]


@given(read(), st.integers(1, 5))
@settings(max_examples=30)
def test_sums_are_those_of_the_tokens_on_any_number_of_ranks(batches, ranks):
    for expert, grams in enumerate(grams_of(batches, ranks)):
        for held_out, gram_DD in ((False, grams.fitted_DD), (True, grams.held_out_DD)):
            parts = [batch[expert] for i, batch in enumerate(batches) if is_held_out(i, len(batches)) == held_out]
            vectors = torch.cat([torch.zeros(0, len(gram_DD)), *parts]).double()
            assert (gram_DD - vectors.T @ vectors).norm() <= 1e-6 * (vectors.T @ vectors).norm()


def test_a_rank_without_a_term_has_the_whole_matrix():
    batches = [[torch.randn(3, 2 * BLOCK + 1)] * EXPERTS for _ in range(2)]  # one is held out, by the second rank
    for grams in grams_of(batches, ranks=2):
        assert torch.equal(grams.held_out_DD, grams.held_out_DD.T) and torch.equal(grams.fitted_DD, grams.fitted_DD.T)


@given(windows=st.integers(1, 90), size=st.integers(1, 4), merged=st.integers(1, 9))
def test_merged_micro_batches_hold_out_the_same_windows(windows, size, merged):
    batches, apart = micro_batches_of(windows, size, merged), windows_held_out(windows, size)
    assert sorted(window for batch in batches for window in batch) == list(range(windows))
    assert merged > 1 or batches == [batch.tolist() for batch in torch.arange(windows).split(size)]
    for index, batch in enumerate(batches):
        assert 0 < len(batch) <= size * merged
        assert {apart[window] for window in batch} == {is_held_out(index, len(batches))}


@pytest.mark.parametrize(("value", "ranks"), [(torch.nan, 1), (1e30, 2)])
def test_what_is_not_finite_names_the_layer(value, ranks):
    batches = [[torch.ones(2, 3)] * EXPERTS, [torch.ones(2, 3), torch.full((1, 3), value), torch.ones(0, 3)]]
    with pytest.raises(UserError, match="activations of layer 0: values are NaN or infinite"):
        grams_of(batches, ranks)
