"""Greedy generation: the tokens that transformers would generate, and memory that is known beforehand."""

import pytest
import torch
from families import make_model

from hfprune_dist.evaluation import generation
from hfprune_dist.evaluation.generation import Workload, peak_bytes, time_generation

CPU = torch.device("cpu")


# They differ in how they count positions: by the cache, anew (bamba), or along several axes.
@pytest.mark.parametrize("name", ["llama", "bamba", "qwen2_5_vl"])
def test_tokens_are_those_of_transformers_without_an_end(name, monkeypatch):
    model, workload = make_model(name), Workload(3, 8, 6)
    prompts_BT = workload.prompts(64, CPU).clamp(min=3)  # tokens before stand for images
    tokens, step = [], generation._step

    def seen(*arguments, **positions):
        next_B1, cache = step(*arguments, **positions)
        tokens.append(next_B1)
        return next_B1, cache

    monkeypatch.setattr(generation, "_step", seen)
    seconds = time_generation(model, prompts_BT, workload.new_tokens)
    model.generation_config.eos_token_id = None
    expected = model.generate(prompts_BT, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.cat([prompts_BT, *tokens], dim=1), expected)
    assert seconds.first > 0 and seconds.others > 0


def test_the_peak_is_what_is_held_at_once():
    kept = torch.zeros(1000)

    def action():
        first = torch.zeros(1_000_000)
        second = first + kept[0]
        del first
        third = second[:10].clone()
        return torch.zeros(100_000), third

    assert 8_000_000 <= peak_bytes(action, CPU) < 8_001_000
    assert peak_bytes(lambda: None, CPU) == 0
