import pytest
from families import save_model
from hfprune_launch.slurm.estimate import estimate_stages, refuse_what_cannot_fit
from hfprune_launch.slurm.profile import load_profile
from sweeps import make_inputs, planned, sweep

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.errors import UserError
from hfprune_dist.planning.dimensions import checkpoint_dimensions, dimensions_of
from hfprune_dist.planning.evaluation_footprint import Evaluate
from hfprune_dist.planning.expert_shapes import ExpertTarget
from hfprune_dist.planning.footprint import RESERVE
from hfprune_dist.planning.gpu_needs import GIB
from hfprune_dist.planning.layer_pass_footprint import LowRank, Reference, Refit
from hfprune_dist.planning.local_shapes import LocalTarget
from hfprune_dist.planning.plain_shapes import plain_shapes
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.store.artifacts import Store

STRUCTURES = ("neurons", "kv_groups", "layers")
GPUS = "tasks_per_node: 2\ngpus_per_node: 2\n"
LLAMA_7B = dimensions_of(
    {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    }
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimate")
    return make_inputs(folder)


def estimates(inputs, tmp_path, profile, **overrides):
    config, plan = planned(inputs, **overrides)
    file = tmp_path / "profile.yaml"
    file.write_text(profile)
    return estimate_stages(plan, list(plan.stages), load_profile(str(file), tmp_path / "none"), config.runtime)


def test_stages_that_run_a_model_on_gpus_are_estimated(inputs, tmp_path):
    profile = GPUS + "gpu_memory_gib: 80\n"
    found = estimates(inputs, tmp_path, profile, importance__dtype="bfloat16", methods=["fisher-refit"])
    assert {each.stage.kind for each in found} == {"importance", "reference", "prune", "recover", "evaluate"}
    assert all(each.fits and each.memory.total > 0 for each in found)


def test_a_micro_batch_has_four_rows_where_ranks_can_share_so_many(inputs, tmp_path):
    """A shard belongs to one rank."""

    def importance(samples):
        profile = "nodes: 4\n" + GPUS + "gpu_memory_gib: 80\n"
        settings = {"calibration__samples": samples, "calibration__micro_batch_size": 1, "calibration__shard_size": 2}
        found = estimates(inputs, tmp_path, profile, methods=["hfprune"], **settings)
        return next(each for each in found if each.stage.kind == "importance")

    assert importance(16).advice == "nodes 4, calibration.micro_batch_size 1", "a shard for each rank"
    assert importance(256).advice == "nodes 4, calibration.micro_batch_size 4"


@pytest.mark.parametrize(
    ("batch_size", "advice"),
    [(8, "nodes 4, recovery.micro_batch_size 2"), (6, "nodes 3, recovery.micro_batch_size 2"), (2, "nodes 1, ")],
)
def test_a_recovery_is_to_have_nodes_and_rows_that_share_a_step_evenly(inputs, tmp_path, batch_size, advice):
    profile = "nodes: 3\ntasks_per_node: 1\ngpus_per_node: 1\ngpu_memory_gib: 80\n"
    settings = {"recovery__batch_size": batch_size, "recovery__micro_batch_size": 1, "runtime__sharding": "zero3"}
    found = estimates(inputs, tmp_path, profile, **settings)
    assert next(each for each in found if each.stage.kind == "recover").advice.startswith(advice)


def test_whole_weights_that_do_not_fit_are_to_be_sharded(inputs, tmp_path):
    def evaluation(gib, **overrides):
        found = estimates(
            inputs, tmp_path, f"{GPUS}gpu_memory_gib: {gib}\n", runtime__sharding="replicate", **overrides
        )
        return next(each for each in found if each.stage.kind == "evaluate")

    assert evaluation(80).advice == ""
    assert evaluation(1e-5).advice == "runtime.sharding zero3"
    assert evaluation(0.01, evaluation__batch_size=4096).advice.startswith("evaluation.batch_size ")


def test_a_distillation_is_estimated_from_the_windows_that_it_reads(inputs, tmp_path):
    def distillation(**overrides):
        profile = GPUS + "gpu_memory_gib: 80\n"
        methods = {"methods": ["surgeon-uniform-block"], "distillation__dtype": "bfloat16", "prune__distill": 2}
        return next(
            it for it in estimates(inputs, tmp_path, profile, **methods | overrides) if it.stage.kind == "distill"
        )

    once, twice = distillation(prune__distill=1), distillation(prune__distill=2)
    assert once.memory == twice.memory
    longer = distillation(calibration__sequence_length=64)
    assert longer.memory.activations > twice.memory.activations


def test_no_more_windows_are_counted_than_run_at_once(inputs, tmp_path):
    """Fewer run where a calibration has fewer windows than fit a micro-batch, and where only texts are compared."""

    def memory(kind, **overrides):
        found = estimates(inputs, tmp_path, GPUS + "gpu_memory_gib: 80\n", **overrides)
        return next(each.memory for each in found if each.stage.kind == kind)

    whole, more = (
        memory("importance", calibration__samples=16, calibration__micro_batch_size=size) for size in (16, 64)
    )
    assert whole == more
    one, eight = (memory("evaluate", evaluation__batch_size=size) for size in (1, 8))
    assert memory("evaluate", evaluation__batch_size=8, evaluation__tasks=[]) == one != eight


def test_windows_of_text_are_never_batched_and_requests_of_tasks_are_not_taken_to_be_as_long():
    def tokens(job):
        one, none = (Evaluate(number, 1).memory(LLAMA_7B, 1).activations for number in (1, 0))
        return (job.memory(LLAMA_7B, 1).activations - none) / (one - none)

    assert tokens(Evaluate.of(8, 512, 2)) == 8 * 512 and tokens(Evaluate.of(8, 1024, 2)) == 8 * 1024
    assert tokens(Evaluate.of(4, 8192, 2)) == 8192 and tokens(Evaluate.of(16, 8192, 2)) == 16 * 1024
    assert tokens(Evaluate.of(0, 512, 2)) == tokens(Evaluate.of(1, 512, 2)) == 512


def test_a_smaller_batch_is_not_suggested_where_windows_of_text_do_not_fit():
    assert Evaluate.of(64, 32768, 2).resized(4).memory(LLAMA_7B, 1) == Evaluate.of(0, 32768, 2).memory(LLAMA_7B, 1)
    assert Evaluate.of(1, 2048, 2).resized(4).memory(LLAMA_7B, 1) == Evaluate.of(4, 2048, 2).memory(LLAMA_7B, 1)


def test_two_models_that_are_timed_in_turn_must_fit_one_gpu(inputs, tmp_path):
    def measurement(gib, **overrides):
        settings = {"efficiency__enabled": True, "efficiency__new_tokens": 8, "efficiency__prompt_tokens": [8]}
        found = estimates(inputs, tmp_path, f"{GPUS}gpu_memory_gib: {gib}\n", **settings | overrides)
        return next(it for it in found if it.stage.kind == "efficiency")

    roomy, tight = measurement(80), measurement(1e-4)
    assert (roomy.fits, roomy.advice) == (True, "")
    assert not tight.fits and "fewer efficiency.batch_sizes" in tight.advice
    assert roomy.memory.activations == 4 * measurement(80, efficiency__batch_sizes=[2]).memory.activations


def test_nothing_is_claimed_that_the_profile_does_not_say(inputs, tmp_path):
    assert all(each.fits is None for each in estimates(inputs, tmp_path, GPUS))
    assert estimates(inputs, tmp_path, "tasks_per_node: 2\n") == [], "no GPUs, no estimates"


def test_a_plan_that_cannot_fit_is_refused_with_what_would_help(inputs, tmp_path):
    many = {"calibration__samples": 4096, "calibration__micro_batch_size": 4096}
    small = estimates(inputs, tmp_path, GPUS + "gpu_memory_gib: 0.3\n", **many)
    with pytest.raises(
        UserError, match=r"importance alpha: about .* GiB on each GPU, which has 0.3 GiB.*micro_batch_size 4"
    ):
        refuse_what_cannot_fit([each for each in small if each.stage.kind == "importance"])
    none = estimates(inputs, tmp_path, GPUS + "gpu_memory_gib: 0.001\n")
    with pytest.raises(UserError, match="no number of nodes is enough"):
        refuse_what_cannot_fit(none)


def test_hidden_states_of_all_ranks_of_a_node_must_fit_its_main_memory(inputs, tmp_path):
    def importance(memory, **overrides):
        found = estimates(inputs, tmp_path, GPUS + memory, **overrides)
        return [each for each in found if each.stage.kind == "importance"]

    small = importance("memory: 20K\n", importance__criteria=["surgeon"])
    with pytest.raises(UserError, match=r"importance alpha: .* of hidden states .*more nodes, or fewer .*surgeon"):
        refuse_what_cannot_fit(small)
    refuse_what_cannot_fit(importance("memory: 2G\n", importance__criteria=["surgeon"]))
    refuse_what_cannot_fit(importance("", importance__criteria=["surgeon"]))
    more = importance("", importance__criteria=["surgeon"], calibration__samples=64)
    assert more[0].host_memory > small[0].host_memory, "hidden states of all windows"


def prunings(inputs, tmp_path, profile, **overrides):
    found = estimates(inputs, tmp_path, GPUS + profile, **overrides)
    return [each for each in found if each.stage.kind == "prune"]


def test_a_refit_is_estimated_and_a_prune_stage_without_one_is_not(inputs, tmp_path):
    (tmp_path / "uniform.yaml").write_text("{criterion: surgeon, refit: dense}")
    totals = [
        prunings(inputs, tmp_path, "", methods=[method], ratios=[0.2])[0].memory.total
        for method in (str(tmp_path / "uniform.yaml"), "surgeon-uniform-block")
    ]
    assert totals == sorted(totals) and totals[0] < totals[1]
    assert prunings(inputs, tmp_path, "", methods=["hfprune"]) == []
    (tmp_path / "measured.yaml").write_text("{criterion: entropy, allocation: searched}")
    assert prunings(inputs, tmp_path, "", methods=[str(tmp_path / "measured.yaml")]) == []


def test_biases_take_what_a_reference_does_on_the_same_windows(inputs, tmp_path):
    (bias,) = prunings(inputs, tmp_path, "gpu_memory_gib: 1\n", methods=["flap"], ratios=[0.2], models=["alpha"])
    job = Reference(1, 32, 8, itemsize=4)
    dims = dimensions_of(open_checkpoint(inputs.parent / "alpha").config)
    assert bias.memory == job.memory(dims, 2) and bias.host_memory == 2 * job.host_bytes(dims, 2) and bias.fits


def test_hidden_states_of_a_reference_must_fit_main_memory(inputs, tmp_path):
    """Where a method distills, those of calibration windows must fit as well."""

    def calibration(samples):
        overrides = {"calibration__samples": samples, "calibration__sequence_length": 32}
        overrides |= {"methods": ["hfprune"], "distillation__dtype": "float32", "prune__distill": 2}
        found = estimates(inputs, tmp_path, GPUS, **overrides)
        return next(each.host_memory for each in found if each.stage.label == "alpha calibration")

    hidden_size = open_checkpoint(inputs.parent / "alpha").config["hidden_size"]
    assert calibration(128) - calibration(64) == 64 * 32 * hidden_size * 4, "all ranks of the node together"
    none = estimates(inputs, tmp_path, GPUS + "memory: 1K\n")
    with pytest.raises(UserError, match=r"reference alpha held-out: .* GiB of hidden states"):
        refuse_what_cannot_fit([each for each in none if each.stage.kind == "reference"])


def test_one_rank_alone_may_hold_what_two_do_not(inputs, tmp_path):
    """A single rank gathers nothing, so it needs less memory than each of two ranks."""

    def importance(nodes, memory):
        profile = f"nodes: {nodes}\ntasks_per_node: 1\ngpus_per_node: 1\ngpu_memory_gib: {memory}\n"
        found = estimates(inputs, tmp_path, profile, calibration__micro_batch_size=1)
        return next(each for each in found if each.stage.kind == "importance")

    least, more = (importance(nodes, 1).memory.total / (1 - RESERVE) / GIB for nodes in (1, 2))
    assert least < more
    assert importance(2, more * 1.000001).advice == "nodes 2, calibration.micro_batch_size 1"
    assert importance(2, (least + more) / 2).advice == "nodes 4, calibration.micro_batch_size 1", "with smaller shards"
    assert importance(2, least * 1.000001).advice == "nodes 1, calibration.micro_batch_size 1"
    assert importance(2, least * 0.99).advice == ""


def test_where_layers_differ_in_width_one_may_keep_all_neurons(inputs, tmp_path):
    uniform, competing = (
        prunings(inputs, tmp_path, "", ratios=[0.2], prune__allocation=allocation)[0].memory.sums
        for allocation in ("uniform", "global")
    )
    assert uniform < competing
    few = {"prune__allocation": "global", "ratios": [0.1], "prune__multiple_of": 16}
    assert prunings(inputs, tmp_path, "", **few)[0].memory.sums == competing


def test_a_plain_shape_is_as_wide_as_the_widest_that_competes(inputs, tmp_path):
    """It also has the Gram matrices of attention's output, which its refit includes."""
    ratios = {"ratios": [0.2], "prune__refit": "layerwise", "prune__multiple_of": 1}
    uniform, plain = (
        prunings(inputs, tmp_path, "", methods=[method], **ratios)[0]
        for method in ("surgeon-uniform-block", "surgeon-plain")
    )
    assert uniform.memory.sums < plain.memory.sums and uniform.host_memory < plain.host_memory
    checkpoint = open_checkpoint(inputs.parent / "alpha")
    widest = max(it.width for it in plain_shapes(ShapeTarget(checkpoint, 0.2, STRUCTURES, 1, "alpha")))
    job = Refit(1, 32, 8, pursues=True, steps=False, searches=True, share_kept=widest / 48, itemsize=4, kv_groups=True)
    assert plain.memory == job.memory(dimensions_of(checkpoint.config), 2)


def test_a_refit_that_cannot_fit_is_refused_with_what_would_help(inputs, tmp_path):
    large = {"calibration__micro_batch_size": 512, "calibration__samples": 512, "ratios": [0.2]}
    with pytest.raises(UserError, match=r"prune alpha 0\.2: about .*micro_batch_size 64"):
        refuse_what_cannot_fit(prunings(inputs, tmp_path, "gpu_memory_gib: 0.02\n", **large))
    with pytest.raises(UserError, match=r"prune alpha 0\.2: .*another refit"):
        refuse_what_cannot_fit(prunings(inputs, tmp_path, "gpu_memory_gib: 0.0001\n", ratios=[0.2]))
    with pytest.raises(UserError, match=r"prune alpha 0\.2: .* GiB of hidden states on each node"):
        refuse_what_cannot_fit(prunings(inputs, tmp_path, "gpu_memory_gib: 1\nmemory: 20K\n", **large))


def test_checkpointing_is_known_to_the_estimate(inputs, tmp_path):
    plain, checkpointed = (
        {
            each.stage.kind: each.memory
            for each in estimates(inputs, tmp_path, GPUS, runtime__activation_checkpointing=on)
        }
        for on in (False, True)
    )
    assert checkpointed["importance"].activations != plain["importance"].activations
    assert checkpointed["recover"] == plain["recover"]


@pytest.mark.parametrize(("memory", "code"), [("80", 0), ("0.001", 2)])
def test_a_dry_run_shows_estimates_and_refuses(inputs, tmp_path, memory, code):
    profile = tmp_path / "gpus.yaml"
    profile.write_text(GPUS + f"gpu_memory_gib: {memory}\n")
    arguments = ["--dry-run", "--profile", str(profile)]
    result = sweep(inputs, tmp_path / "out", *arguments)
    assert result.returncode == code, result.stderr
    assert "nothing here was measured" in result.stdout and "Traceback" not in result.stderr
    assert "importance 2 x no run yet" in result.stdout
    assert ("can't fit the profile's GPUs" in result.stderr) == (code == 2)
    assert not Store(tmp_path / "out" / "store").root.exists()


@pytest.mark.parametrize("protect_first", [0, 1])
def test_of_local_shapes_the_widest_layer_counts(inputs, tmp_path, protect_first):
    settings = {"ratios": [0.1], "prune__refit": "dense", "prune__protect_first": protect_first}
    found = prunings(inputs, tmp_path, "", methods=["wanda-sp"], **settings)[0]
    checkpoint = open_checkpoint(inputs.parent / "alpha")
    asked = ShapeTarget(checkpoint, 0.1, STRUCTURES[:2], 1, "alpha")
    widest = max(LocalTarget(asked, protect_first, 0).shape().units["neurons"])
    assert (widest == 48) == bool(protect_first)
    job = Refit(
        1, 32, 8, pursues=False, steps=False, searches=False, share_kept=widest / 48, itemsize=4, kv_groups=True
    )
    assert found.memory == job.memory(dimensions_of(checkpoint.config), 2)


def test_a_refit_of_experts_has_their_gram_matrices(inputs, tmp_path):
    folder = save_model(tmp_path / "moe", "qwen2_moe", vocab_size=264)
    settings = {"models": [str(folder)], "methods": ["hfprune-refit"], "ratios": [0.2]}
    found = prunings(inputs, tmp_path, "", **settings)[0]
    checkpoint = open_checkpoint(folder)
    shape = ExpertTarget(ShapeTarget(checkpoint, 0.2, STRUCTURES[:1], 1, "moe")).shape()
    kept = max(shape.units["expert_neurons"]) / checkpoint.structures["expert_neurons"].most
    job = Refit(1, 32, 8, pursues=False, steps=False, searches=False, share_kept=kept, itemsize=4)
    assert found.memory == job.memory(checkpoint_dimensions(checkpoint), 2)
    sums = 16 * (4 * 24**2 + 20**2)
    assert found.memory.sums > sums and found.host_memory > 2 * sums, "of a layer, and on each rank of one that waits"


def test_a_low_rank_pass_is_estimated_and_more_memory_is_what_helps(inputs, tmp_path):
    lorap = {"methods": ["lorap"], "ratios": [0.2]}
    found = prunings(inputs, tmp_path, "gpu_memory_gib: 80\n", **lorap)[0]
    dims = dimensions_of(open_checkpoint(inputs.parent / "alpha").config)
    job = LowRank(1, 32, 8, itemsize=4)
    assert found.memory == job.memory(dims, 2) and found.fits
    assert found.host_memory == 2 * job.host_bytes(dims, 2)
    with pytest.raises(UserError, match=r"prune alpha 0\.2: .*GPUs with more memory, or shorter sequences"):
        refuse_what_cannot_fit(prunings(inputs, tmp_path, "gpu_memory_gib: 0.0001\n", **lorap))


def test_gradients_of_weights_are_estimated_in_both_memories(inputs, tmp_path):
    def importance(method):
        found = estimates(inputs, tmp_path, GPUS, methods=[method], ratios=[0.2])
        return next(each for each in found if each.stage.kind == "importance")

    without, found = importance("wanda-sp"), importance("llm-pruner")
    assert found.memory.sums > without.memory.sums == 0 and found.host_memory > without.host_memory == 0
