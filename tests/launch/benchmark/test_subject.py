"""The two formulations being compared compute the same scores."""

import copy

import pytest
import torch
from core_definition import definition
from families import save_model
from hfprune_launch.benchmark.scoring import GRADIENT_CRITERIA
from hfprune_launch.benchmark.subject import Subject, load_subject
from tiny import tiny_model

from hfprune_dist.checkpoints.families import FAMILIES


def subject_of(model, **options):
    family = FAMILIES[model.config.model_type]
    return Subject(model, family, family.units(model.config.to_dict()), **options)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_published_and_ours_agree_with_the_definition(checkpointing):
    model = tiny_model("qwen2", num_hidden_layers=3)
    windows = torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(1))
    expected = definition(copy.deepcopy(model), windows)
    subject = subject_of(model, checkpointing=checkpointing)
    for window in windows:
        published = subject.published(window[None])
    ours = subject.ours(list(windows[:, None]), ["entropy"])[0]
    for scores in (torch.stack(published).double(), ours):
        assert (scores - expected).norm() / expected.norm() < 1e-5


def test_ours_shares_the_weights_and_gives_them_no_gradients():
    model = tiny_model()
    subject = subject_of(model)
    subject.ours([torch.ones(1, 8, dtype=torch.int64)], GRADIENT_CRITERIA)
    assert all(weight.grad is None for weight in model.parameters())
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert not subject.ours([torch.ones(1, 8, dtype=torch.int64)], ["entropy"]).any()


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_neox", "granite"])
def test_both_agree_on_models_of_other_families(tmp_path, model_type):
    """With capped or scaled logits, and without gates."""
    subject = load_subject(str(save_model(tmp_path / "model", model_type)), "float32")
    window = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(1))
    published, ours = torch.stack(subject.published(window)).double(), subject.ours([window], ["entropy"])[0]
    assert (ours - published).norm() / published.norm() < 1e-5
