"""Operations of real stages over tiny models, as torch counts them, against what plan and manifests say."""

import importlib
import shutil
from itertools import product

import pytest
import torch
from counted_flops import counting
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from refitting import checkpoint_in, refit, some_kept, windows_of
from scoring import make_stage
from tiny import tiny_model
from worlds import Ranks, without_deepspeed

from hfprune_dist.checkpoints.families import FAMILIES
from hfprune_dist.checkpoints.lora_adapter import lora_targets
from hfprune_dist.config.parameters import LoraPruneParameters, PruneParameters, RecoverParameters
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.config.training import DistillationConfig, RecoveryConfig
from hfprune_dist.core import triangle
from hfprune_dist.core.lora_scores import Factors, unit_scores
from hfprune_dist.data.schedule import Schedule
from hfprune_dist.models.distillation_head import DistillingHead
from hfprune_dist.planning.expected_metrics import ExpectedManifests
from hfprune_dist.planning.model_shape import ModelShape
from hfprune_dist.planning.plain_shapes import plain_shapes
from hfprune_dist.planning.plan import Plan
from hfprune_dist.planning.stage_costs import NOTHING, StageCosts, _FinalRefit, rows_trained
from hfprune_dist.stages import finals, prune_plain
from hfprune_dist.stages.context import Context
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input, Stage

ALL = ["neurons", "kv_groups", "layers"]
LIMITS = {"floor": 0.2, "protect_first": 0, "protect_last": 0}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Compute Gram matrices in one go."""
    monkeypatch.setattr(triangle, "BLOCK", 2**40)
    without_deepspeed(monkeypatch)


def counted(store, stage):
    """Count the operations of a complete run of a stage on one rank."""

    def work(world):
        store.work(stage.id).mkdir(parents=True, exist_ok=True)
        with counting() as total:
            context = Context(stage, store, world, RuntimeConfig(), Progress(None), {}, {}, 1)
            importlib.import_module(f"hfprune_dist.stages.{stage.kind}").run(context)
            return total()

    (flops,) = Ranks(1).run(work)
    return flops


def cost_of(store, *stages):
    """Return the cost of the last of the given stages."""
    plan = Plan({stage.id: stage for stage in stages}, ())
    return StageCosts(plan, lambda stage_id: store.handle(stage_id).manifest()).of(stages[-1].id)


@pytest.mark.parametrize(
    ("criteria", "structures"),
    [
        (["entropy"], ("neurons",)),
        (["fisher", "activation"], ("neurons", "kv_groups")),
        (["self_distillation"], ("neurons",)),
        (["surgeon"], ("neurons", "kv_groups")),
        (["weight_taylor"], ("neurons",)),
        (["coupled_taylor"], ("neurons", "kv_groups")),
        (["weight_taylor_second_order"], ("neurons", "kv_groups")),
        (["weight_taylor", "entropy"], ("neurons", "kv_groups")),
        (["magnitude"], ("neurons",)),
    ],
)
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_a_calibration_pass(tmp_path, variant, criteria, structures):
    store, stage = Store(tmp_path / "store"), make_stage(tmp_path, variant, criteria=criteria, structures=structures)
    flops, cost = counted(store, stage), cost_of(store, stage)
    if criteria == ["magnitude"]:
        assert cost == NOTHING and flops < 100
        return
    assert cost.tokens == 6 * 24
    # The correction of rows during an elimination is not counted.
    assert cost.flops == pytest.approx(flops, rel=0.06 if criteria == ["surgeon"] else 1e-4)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A store with a model's scores, and the stage that made them."""
    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        without_deepspeed(patch)
        stage = make_stage(folder, criteria=["entropy"], structures=("neurons", "kv_groups"))
        counted(Store(folder / "store"), stage)
    return Store(folder / "store"), stage


@pytest.mark.parametrize(
    ("allocation", "refit", "structures"),
    [
        ("uniform", "none", ["neurons"]),
        ("global", "dense", ["neurons", "kv_groups"]),
        ("uniform", "layerwise", ["neurons"]),
        ("local", "none", ["neurons", "kv_groups"]),
        ("local", "dense", ["neurons", "kv_groups"]),
        ("uniform", "bias", ["neurons"]),
        ("standardized", "bias", ["neurons", "kv_groups"]),
        ("plain", "none", ALL),
        ("plain", "dense", ALL),
        ("plain", "layerwise", ALL),
        ("searched", "dense", ["neurons"]),
        ("searched", "layerwise", ALL),
        ("low_rank", "none", ["neurons"]),
    ],
)
def test_a_cut(scored, monkeypatch, allocation, refit, structures):
    monkeypatch.setattr(finals, "HOPELESS", 1e6)  # so that there are finalists
    store, importance = scored
    params = {"ratio": 0.25, "criterion": "entropy", "allocation": allocation, "refit": refit, "multiple_of": 1}
    params |= LIMITS if allocation in ("global", "standardized", "searched") else {}
    params |= {"protect_first": 0, "protect_last": 1} if allocation == "local" else {}
    params |= {} if structures == ["neurons"] else {"structures": structures}
    params |= {"criterion": "lorap"} if allocation == "low_rank" else {}
    runs = refit != "none" or allocation in ("plain", "searched", "low_rank")
    params |= {"dtype": "float32", "micro_batch_size": 1} if runs else {}
    inputs = {"model": importance.inputs["model"], "importance": importance.as_input()}
    stage = Stage("prune", "tiny", params, inputs)
    shutil.rmtree(store.root / "layers", ignore_errors=True)  # the order of layers is not known
    flops, cost = counted(store, stage), cost_of(store, importance, stage)
    assert cost == NOTHING if not runs else cost.tokens == 6 * 24
    # So few neurons leave a search few shapes, some of which recur.
    assert cost.flops == pytest.approx(flops, rel=0.25 if allocation == "searched" else 1e-4)
    plan = Plan({it.id: it for it in (importance, stage)}, ())
    expected = StageCosts(plan, ExpectedManifests(plan, checkpointing=False).of).of(stage.id)
    # The shapes of a search, and the number of finalists, are known only once they have been measured.
    assert expected.tokens == cost.tokens
    assert expected.flops == pytest.approx(flops, rel=1e-4 if allocation in ("uniform", "low_rank") else 0.8)


@pytest.mark.parametrize("refit", ["dense", "layerwise", "block"])
def test_a_cut_whose_refit_sees_copies(scored, refit):
    store, importance = scored
    params = {"ratio": 0.25, "criterion": "entropy", "allocation": "uniform", "refit": refit, "multiple_of": 1}
    params |= {"dtype": "float32", "micro_batch_size": 1, "refit_copies": 2}
    params |= {"refit_iterations": 5} if refit == "block" else {}
    stage = Stage("prune", "tiny", params, {"model": importance.inputs["model"], "importance": importance.as_input()})
    flops, cost = counted(store, stage), cost_of(store, importance, stage)
    assert cost.flops == pytest.approx(flops, rel=1e-4)
    del params["refit_copies"]
    without = Stage("prune", "tiny", params, stage.inputs)
    counted(store, without)
    assert cost.without_copies == cost_of(store, importance, without).operations


@pytest.mark.parametrize("refit", ["none", "dense", "layerwise"])
def test_a_second_round(scored, monkeypatch, refit):
    """The model numbers its layers anew, and is compared with the dense one."""
    monkeypatch.setattr(finals, "HOPELESS", 1e6)
    store, importance = scored
    params = {"criterion": "entropy", "allocation": "plain", "refit": refit, "multiple_of": 1, "structures": ALL}
    params |= {"dtype": "float32", "micro_batch_size": 1}
    model = importance.inputs["model"]
    first = Stage("prune", "1", {**params, "ratio": 0.1}, {"model": model, "importance": importance.as_input()})
    with monkeypatch.context() as patch:
        patch.setattr(prune_plain, "plain_shapes", fewest_layers)
        counted(store, first)
    again = Stage("importance", "2", importance.params, {**importance.inputs, "model": first.as_input()})
    counted(store, again)
    inputs = {"model": first.as_input(), "importance": again.as_input(), "dense": model}
    second = Stage("prune", "2", {**params, "ratio": 0.35}, inputs)
    stages = importance, first, again, second
    flops, cost = counted(store, second), cost_of(store, *stages)
    assert cost.flops == pytest.approx(flops, rel=1e-4)
    plan = Plan({it.id: it for it in stages}, ())
    expected = StageCosts(plan, ExpectedManifests(plan, checkpointing=False).of).of(second.id)
    assert expected.flops == pytest.approx(flops, rel=0.8)


def fewest_layers(target, before):
    """Return the plain shape that lacks the most layers and, among those, the most neurons."""
    return [min(plain_shapes(target, before))]


def trained(folder, kind, params, **metrics):
    """Return a training stage's cost from settings and metrics, for a model of which only the configuration exists."""
    scores = Stage("importance", "tiny", calibration_of(24), {"model": Input("digest", str(folder))})
    dense = Stage("reference", "tiny", {}, {"importance": scores.as_input()})
    stage = Stage(kind, "tiny", params, {"model": Input("digest", str(folder)), "reference": dense.as_input()})
    manifests = {stage.id: {"metrics": metrics}}
    return StageCosts(Plan({it.id: it for it in (scores, dense, stage)}, ()), manifests.get).of(stage.id)


def calibration_of(tokens):
    settings = {"samples": 6, "sequence_length": tokens, "micro_batch_size": 1, "shard_size": 2, "text_field": "text"}
    calibration = {**settings, "settled": None}
    return {"calibration": calibration, "criteria": [], "dtype": "float32", "add_bos_token": True, "seed": 3}


SIZES = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([16, 32, 48]),
        "intermediate_size": st.integers(8, 80),
        "num_hidden_layers": st.integers(1, 3),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
    }
)


@given(sizes=SIZES, rank=st.integers(1, 9), distills=st.booleans())
@settings(max_examples=12, deadline=None)
def test_a_step_of_lora(tmp_path_factory, sizes, rank, distills):
    """It covers recovery, whose rows hold several pairs, and distillation, whose head has a teacher."""
    rows, tokens, family = 3, 24, FAMILIES["llama"]
    folder, model = tmp_path_factory.mktemp("model"), tiny_model("llama", **sizes)
    model.config.save_pretrained(folder)
    adapted = with_adapter(model, rank).train()
    input_ids, positions = torch.randint(264, (rows, tokens)), torch.arange(tokens // 2).repeat(rows, 2)
    with counting() as total:
        if distills:
            head = DistillingHead(model, family)
            head.expect(torch.randn(rows, tokens, sizes["hidden_size"]), rows)
            adapted(input_ids=input_ids, use_cache=False).logits.backward()
        else:
            labels = {"position_ids": positions, "labels": input_ids}
            adapted(input_ids=input_ids, use_cache=False, **labels).loss.backward()
    training = {"rank": rank, "dropout": 0.05, "batch_size": rows}
    if distills:
        distillation = DistillationConfig(**training).model_dump()
        cost = trained(folder, "distill", {"distillation": distillation, "passes": 2, "seed": 0}, tokens=rows * tokens)
        assert (cost.tokens, cost.flops) == (2 * rows * tokens, pytest.approx(2 * total(), rel=1e-4))
    else:
        recovery = RecoveryConfig(path=str(folder), sequence_length=tokens, **training)
        params = RecoverParameters(recovery=recovery, seed=0).to_json()
        cost = trained(folder, "recover", params, rows=rows, steps=5)
        assert (cost.tokens, cost.flops) == (5 * rows * tokens, pytest.approx(5 * total(), rel=1e-4))


@given(sizes=SIZES, rank=st.integers(1, 9), kinds=st.integers(1, 2), protected=st.integers(0, 1))
@settings(max_examples=12, deadline=None)
def test_scores_of_loraprune_cost_three_products_a_weight_and_step(tmp_path_factory, sizes, rank, kinds, protected):
    folder, family = tmp_path_factory.mktemp("model"), FAMILIES["llama"]
    model = tiny_model("llama", **sizes)
    model.config.save_pretrained(folder)
    structures = ["neurons", "kv_groups"][:kinds]
    layers = range(protected, sizes["num_hidden_layers"])
    with counting() as total:
        for units in (family.structures(model.config.to_dict())[kind] for kind in structures):
            for layer, owned in product(layers, units.owned):
                if owned.tensor.endswith("weight"):
                    weight = model.get_parameter(units.tensor(layer, owned.tensor)).detach()
                    a, b = torch.ones(rank, weight.shape[1]), torch.ones(weight.shape[0], rank)
                    unit_scores(weight, Factors(a, b, a, b, 1.0), owned.axis, owned.per_unit)
    recovery = RecoveryConfig(path=str(folder), sequence_length=24, batch_size=3, rank=rank)
    common = {"recovery": recovery, "seed": 0}
    limits = {"multiple_of": 1, "tensor_parallel": 1, "protect_first": protected, "protect_last": 0}
    params = LoraPruneParameters(**common, ratio=0.1, structures=structures, **limits)
    cost = trained(folder, "loraprune", params.to_json(), rows=3, steps=5)
    recovered = trained(folder, "recover", RecoverParameters(**common).to_json(), rows=3, steps=5)
    assert cost.tokens == recovered.tokens
    assert cost.flops - recovered.flops == pytest.approx(5 * total(), rel=1e-4, abs=1)


def with_adapter(model, rank):
    targets = lora_targets(FAMILIES["llama"])
    adapter = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_dropout=0.05, target_modules=targets)
    return get_peft_model(model, adapter, autocast_adapter_dtype=False)


@given(rows=st.integers(1, 50), batch_size=st.integers(1, 60), steps=st.integers(1, 40))
def test_rows_are_counted_as_they_are_scheduled(rows, batch_size, steps):
    schedule = Schedule(rows, batch_size, seed=0)
    assert rows_trained(rows, batch_size, steps) == sum(len(schedule.rows_of(step)) for step in range(steps))


def test_a_pruned_model_counts_as_it_is_and_what_is_not_known_costs_nothing_known(scored, tmp_path):
    _, importance = scored
    prune = Stage("prune", "tiny", {"ratio": 0.2}, {"model": importance.inputs["model"]})
    recovery = RecoveryConfig(path=str(tmp_path), sequence_length=16, batch_size=4)
    params = RecoverParameters(recovery=recovery, seed=0).to_json()
    models = importance.inputs["model"], prune.as_input()
    dense, pruned = (Stage("recover", "tiny", params, {"model": it}) for it in models)
    plan = Plan({it.id: it for it in (importance, prune, dense, pruned)}, ())
    widths = {"intermediate_sizes": [16, 24, 8], "intermediate_size": None}
    manifests = {prune.id: {"metrics": widths}}
    manifests |= {it.id: {"metrics": {"rows": 4, "steps": 1}} for it in (dense, pruned)}
    costs = StageCosts(plan, manifests.get)
    # Forward, and backward to activations, of three matrices in each layer, and the adapters next to them.
    gone = 3 * 48 - sum(widths["intermediate_sizes"])
    less = 4 * 16 * gone * (4 * 3 * 32 + 6 * 3 * 32)
    assert costs.of(dense.id).flops - costs.of(pruned.id).flops == pytest.approx(less)
    assert costs.of(prune.id) is None, "settings of another version"
    assert costs.of(importance.id) is None, "no manifest"
    without_shape = StageCosts(plan, {pruned.id: manifests[pruned.id]}.get)
    assert without_shape.of(pruned.id) is None and without_shape.of(dense.id) is None
    gone = Stage("recover", "tiny", params, {"model": Input("digest", str(tmp_path / "gone"))})
    manifest = {"metrics": {"rows": 4, "steps": 1}}
    assert StageCosts(Plan({gone.id: gone}, ()), lambda _: manifest).of(gone.id) is None


def test_metrics_and_settings_of_other_versions_tell_no_cost(scored):
    _, importance = scored
    params = {"ratio": 0.2, "criterion": "entropy", "allocation": "plain", "refit": "dense", "multiple_of": 1}
    params |= {"dtype": "float32", "micro_batch_size": 1, "structures": ALL}
    other = Stage("importance", "tiny", {"samples": 4}, importance.inputs)
    for source, metrics in ((other, {}), (importance, {"search_kl": {"12 blocks": 1.0}})):
        cut = Stage("prune", "tiny", params, {"model": importance.inputs["model"], "importance": source.as_input()})
        plan = Plan({it.id: it for it in (source, cut)}, ())
        assert StageCosts(plan, {cut.id: {"metrics": metrics}}.get).of(cut.id) is None


@pytest.mark.parametrize("iterations", [1, 2, 6])
def test_ranks_add_up_as_many_numbers_in_gauss_newton_steps(tmp_path, iterations):
    checkpoint, kept = checkpoint_in(tmp_path / "model", "qwen3", 3), some_kept((0, 2))
    summed = {}
    for method in ("layerwise", "block"):
        ranks, options = Ranks(2), {"windows_ST": windows_of(64), "more_iterations": iterations}
        ranks.run(
            lambda world, ranks=ranks, method=method, options=options: refit(
                method, checkpoint, kept, tmp_path / method, world=world, **options
            )
        )
        summed[method] = sum(call.bytes for call in ranks.logs[0] if call.kind.startswith("all_reduce"))
    params = PruneParameters(
        ratio=0.3, criterion="surgeon", allocation="global", refit="block", multiple_of=1, refit_iterations=iterations
    )
    whole = ModelShape.of(checkpoint)
    shape = whole.pruned({"intermediate_sizes": [len(it) for it in kept.units["neurons"]], "num_hidden_layers": 2})
    expected = _FinalRefit(params, whole, whole, shape, [1]).added_up
    of_neurons = 2 * 2 * sum(len(it) for it in kept.units["neurons"])  # gate's and up's, too few to be counted
    assert summed["block"] - summed["layerwise"] == 8 * (expected + of_neurons)
