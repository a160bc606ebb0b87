"""Hours are those of finished stages of the same kind and model in the store; of others nothing is said."""

from hfprune_launch.slurm.status import stage_statuses
from hfprune_launch.sweep_folder import measured_hours
from made_stages import being_made, stage_of

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input


def scores_and_cut(model, ratio):
    dense = Input(model, f"/{model}")
    scores = stage_of("importance", model, {}, {"model": dense})
    cut = stage_of("prune", f"{model} {ratio}", {"ratio": ratio}, {"model": dense, "importance": scores.as_input()})
    return scores, cut, stage_of("recover", f"{model} {ratio}", {}, {"model": cut.as_input()})


def test_what_stages_of_the_kind_and_model_took(tmp_path):
    store, hours = Store(tmp_path / "store"), {"importance": 2, "prune": 1, "recover": 6}
    for ratio, times in ((0.1, 1), (0.2, 3)):
        for stage in scores_and_cut("a", ratio):
            seconds = 3600 * times * hours[stage.kind]
            with being_made(store, stage, metrics={"parameters": 1}, wall_time_s=seconds):
                pass
    stages = [*scores_and_cut("a", 0.3), *scores_and_cut("b", 0.3)]
    plan = Plan({stage.id: stage for stage in stages}, (), tuple(stage.id for stage in stages))
    known = [*map(measured_hours(plan, store), stages)]
    assert known[1:] == [2, 12, None, None, None] and known[0] > 0, "whatever the ratio, of the same model"
    left = [line.left for line in stage_statuses(plan, store, {})]
    assert left == ["", "~2.0h", "~12h", "no run yet", "no run yet", "no run yet"]
