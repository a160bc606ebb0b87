"""The prune stage on real ranks, and death at every point of it."""

import json

import pytest
import torch
from cuts import IMPORTANCE, prepare, run_solo, weights_of
from faults.kill import deaths_during
from ranks import killing, killing_in_reduction, run_stage
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hfprune_dist.errors import UserError
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.refit import gauss_newton_ranks as reconstruct
from hfprune_dist.store.artifacts import Store


@pytest.mark.slow
def test_real_ranks_write_a_checkpoint_that_plain_transformers_loads(tmp_path):
    store, stage, scores = prepare(tmp_path, shard_size="20KB")
    result = run_stage(store, stage, ranks=2)
    assert result.returncode == 0, result.stderr[-2000:]
    kept = json.loads((store.path(stage.id) / "kept.json").read_text())["neurons"]
    model = AutoModelForCausalLM.from_pretrained(store.path(stage.id))
    metrics = store.handle(stage.id).manifest()["metrics"]
    assert metrics["intermediate_size"] == model.config.intermediate_size == 14
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["ratio_reached"] == pytest.approx(0.2, abs=0.01)
    for layer in range(2):
        assert kept[layer] == sorted(scores[f"layers.{layer}.entropy"].topk(14).indices.tolist())


def assert_gates_moved(store, stage, folder):
    """Check that some layer's gates moved: otherwise only least squares on the down projection was at work."""
    kept = json.loads((store.path(stage.id) / "kept.json").read_text())["neurons"]
    dense, pruned = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model.layers
        for path in (folder / "model", store.path(stage.id))
    )
    gates = [
        (a.mlp.gate_proj.weight[rows], b.mlp.gate_proj.weight) for a, b, rows in zip(dense, pruned, kept, strict=True)
    ]
    assert not all(torch.equal(*pair) for pair in gates)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refit", "samples", "more"),
    [
        ("dense", 9, {"refit_copies": 1}),
        ("layerwise", 9, {"refit_norms": True}),
        ("block", 64, {}),
        ("block", 2, {"refit_norms": True}),
    ],
)
def test_refit_has_the_same_bits_on_any_number_of_ranks(tmp_path, refit, samples, more):
    """Two samples make one micro-batch, so all ranks but one have nothing to do. Ranks that are threads try other
    numbers (tests/refit).
    """
    weights = []
    for ranks in (1, 2, 4) if samples > 9 else (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        store, stage, _ = prepare(folder, refit=refit, samples=samples, dtype="bfloat16", **more)
        result = run_stage(store, stage, ranks)
        assert result.returncode == 0, result.stderr[-2000:]
        weights.append(weights_of(store, stage))
        if refit == "block" and samples > 2:
            assert_gates_moved(store, stage, folder)
    assert all(others == weights[0] for others in weights)


NORMS = ["model.norm", *(f"model.layers.{n}.{it}_layernorm" for n in (0, 1) for it in ("input", "post_attention"))]


def test_refitted_norms_bring_the_distribution_closer_and_nothing_else_changes(tmp_path):
    tensors, metrics = [], {}
    for also in ({}, {"refit_norms": True}):
        folder = tmp_path / str(len(also))
        folder.mkdir()
        store, stage, _ = prepare(folder, ratio=0.25, refit="layerwise", **also)
        run_solo(store, stage)
        tensors.append(load_file(store.path(stage.id) / "model.safetensors"))
        metrics = store.handle(stage.id).manifest()["metrics"]
    changed = {name for name, it in tensors[0].items() if not torch.equal(it, tensors[1][name])}
    assert changed == {f"{it}.weight" for it in NORMS}
    kls = metrics["norms_kl"]
    assert min(kls) < kls[0]


class Shifting(torch.nn.Module):
    """A norm whose weight is added to its outputs."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(32))

    def forward(self, hidden):
        return torch.nn.functional.rms_norm(hidden, (32,)) + self.weight


def test_a_norm_that_cannot_be_refitted_is_named_before_anything_is_computed(tmp_path, monkeypatch):
    store, stage, _ = prepare(tmp_path, refit="layerwise", refit_norms=True)
    which = "layers.1.post_attention_layernorm"
    read = LayerReader._alone
    monkeypatch.setattr(
        LayerReader, "_alone", lambda self, *of: Shifting() if of[2] == f"model.{which}" else read(self, *of)
    )
    with pytest.raises(UserError, match=rf"^{tmp_path / 'model'}: model\.{which}, Shifting, has no weight that multip"):
        run_solo(store, stage)
    assert not list(store.work(stage.id).iterdir())


# Per layer: two Gram matrices; in each step three sums for the curvature, the right side and every iteration.
REDUCTIONS = 2 + 3 * (2 + reconstruct.ITERATIONS) + 3 * (2 + 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [killing_in_reduction(1, REDUCTIONS + REDUCTIONS // 2), killing(0, 2, "layer-1.")],
    ids=["in a step", "writing"],
)
def test_a_block_goes_on_with_the_same_bits_after_one_of_its_ranks_died_in_the_second_layer(tmp_path, fault):
    (tmp_path / "whole").mkdir()
    reference, stage, _ = prepare(tmp_path / "whole", refit="block", samples=64)
    assert run_stage(reference, stage, 2).returncode == 0
    store, stage, _ = prepare(tmp_path, refit="block", samples=64)
    killed = run_stage(store, stage, 2, environment=fault)
    assert killed.returncode != 0 and not store.path(stage.id).exists()
    assert len(list(store.work(stage.id).glob("refit/layer-*.safetensors"))) == 1
    resumed = run_stage(store, stage, 2)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert weights_of(store, stage) == weights_of(reference, stage)


def test_layers_compete_and_the_checkpoint_loads_with_and_without_its_code(tmp_path):
    store, stage, _ = prepare(tmp_path, ratio=0.1, allocation="global", refit="dense", protect_last=1)
    run_solo(store, stage)
    metrics, folder = store.handle(stage.id).manifest()["metrics"], store.path(stage.id)
    widths = metrics["intermediate_sizes"]
    assert widths == [14, 48] and metrics["intermediate_size"] is None
    assert metrics["ratio_reached"] == pytest.approx(0.1, abs=0.002)
    ours = load_causal_lm(folder, torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert [layer.mlp.down_proj.in_features for layer in ours.model.layers] == widths
    assert sum(p.numel() for p in plain.parameters()) == metrics["parameters"]
    input_ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        assert torch.equal(ours(input_ids).logits, plain(input_ids).logits)
    assert plain.generate(input_ids, max_new_tokens=3).shape == (1, 15)


def test_a_search_takes_the_widths_that_measure_best(tmp_path):
    """The winner's measurement is what the finished checkpoint has on the held-out window."""
    store, stage, _ = prepare(tmp_path, ratio=0.15, allocation="searched")
    run_solo(store, stage)
    metrics, folder = store.handle(stage.id).manifest()["metrics"], store.path(stage.id)
    measured = metrics["search_kl"]
    assert any("everywhere" in name for name in measured) and len(measured) > 8
    held_out = load_file(store.path(IMPORTANCE.id) / "windows.safetensors")["input_ids"][8:]
    with torch.no_grad():
        log_p, log_q = (
            load_causal_lm(path, torch.float32)(held_out).logits.log_softmax(-1)
            for path in (tmp_path / "model", folder)
        )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert kl == pytest.approx(min(measured.values()), rel=1e-4)
    assert metrics["ratio_reached"] == pytest.approx(0.15, abs=0.002)


@pytest.mark.parametrize(
    "method",
    [
        {"refit": "none"},
        {"refit": "block", "samples": 64},
        {"refit": "layerwise", "refit_norms": True},
        {"refit": "dense", "refit_copies": 2},
    ],
    ids=str,
)
def test_death_at_every_point_ends_with_the_same_weights(tmp_path, method):
    reference, stage, _ = prepare(tmp_path, **method)
    (tmp_path / "copies").mkdir()
    deaths = deaths_during(lambda: run_solo(reference, stage), reference.root, tmp_path / "copies")
    if method.get("refit") == "block":
        assert_gates_moved(reference, stage, tmp_path)
    expected = weights_of(reference, stage)
    assert len(deaths) > 10
    for store in map(Store, deaths):
        assert store.handle(stage.id).verify().state in ("missing", "done")
        if store.handle(stage.id).verify().state == "missing":
            run_solo(store, stage)
        assert weights_of(store, stage) == expected
