import pytest
from hfprune_launch.slurm.estimate import estimate_stages, refuse_what_cannot_fit
from hfprune_launch.slurm.profile import load_profile
from sweeps import planned, sweep

from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import Store

GPUS = "tasks_per_node: 2\ngpus_per_node: 2\n"


def estimates(config, tmp_path, profile, **overrides):
    settings, plan = planned(config, **overrides)
    file = tmp_path / "profile.yaml"
    file.write_text(profile)
    return estimate_stages(plan, list(plan.stages), load_profile(str(file), tmp_path / "none"), settings.runtime)


def test_stages_that_run_a_model_on_gpus_are_estimated(config, tmp_path):
    profile = GPUS + "gpu_memory_gib: 80\n"
    found = estimates(config, tmp_path, profile, importance__dtype="bfloat16", methods=["fisher-refit"])
    assert {each.stage.kind for each in found} == {"importance", "reference", "prune", "recover", "evaluate"}
    assert all(each.fits and each.needed > 0 for each in found)
    assert all(each.fits is None for each in estimates(config, tmp_path, GPUS))
    assert estimates(config, tmp_path, "tasks_per_node: 2\n") == [], "no GPUs, no estimates"


def test_a_plan_that_cannot_fit_is_refused_with_what_would_help(config, tmp_path):
    many = {"calibration__samples": 3 * 4096, "calibration__micro_batch_size": 4096}
    small = estimates(config, tmp_path, GPUS + "gpu_memory_gib: 0.5\n", **many)
    with pytest.raises(UserError, match=r"importance alpha: about .* GiB on each GPU, which has 0.5 .*lower calib"):
        refuse_what_cannot_fit([each for each in small if each.stage.kind == "importance"])
    alone = estimates(config, tmp_path, GPUS + "gpu_memory_gib: 0.001\n", calibration__micro_batch_size=1)
    (problem,) = next(each for each in alone if each.stage.kind == "importance").problems
    assert "lower" not in problem and problem.endswith("GPUs with more memory")


def test_hidden_states_of_all_ranks_of_a_node_must_fit_its_main_memory(config, tmp_path):
    def importance(memory, **overrides):
        found = estimates(config, tmp_path, GPUS + memory, **overrides)
        return [each for each in found if each.stage.kind == "importance"]

    small = importance("memory: 20K\n", importance__criteria=["surgeon"])
    with pytest.raises(UserError, match=r"importance alpha: .* of hidden states .*more nodes, or fewer"):
        refuse_what_cannot_fit(small)
    refuse_what_cannot_fit(importance("memory: 2G\n", importance__criteria=["surgeon"]))
    more = importance("", importance__criteria=["surgeon"], calibration__samples=64)
    assert more[0].host_memory > small[0].host_memory, "hidden states of all windows"


def test_a_dry_run_shows_estimates_and_refuses(config, tmp_path):
    profile = tmp_path / "gpus.yaml"
    profile.write_text(GPUS + "gpu_memory_gib: 0.001\n")
    result = sweep(config, tmp_path / "out", "--dry-run", "--profile", str(profile))
    assert result.returncode == 2 and "can't fit the profile's GPUs" in result.stderr
    assert "nothing here was measured" in result.stdout and "Traceback" not in result.stderr
    assert "importance 2 x no run yet" in result.stdout
    assert not Store(tmp_path / "out" / "store").root.exists()
