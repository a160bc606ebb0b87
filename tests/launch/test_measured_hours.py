"""Hours are those of finished stages of the same kind and model in the store; of others nothing is said."""

import io

from hfprune_launch.measured_hours import measured_hours, show_hours
from hfprune_launch.slurm.status import stage_statuses
from made_stages import being_made, stage_of
from rich.console import Console

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
    console = Console(file=io.StringIO(), width=200)
    show_hours(console, plan, store, [stage.id for stage in stages[1:]])
    told = "prune 1 x 2 h, recover 1 x 12 h, importance 1 x no run yet, prune 1 x no run yet, recover 1 x no run yet"
    assert told in console.file.getvalue()
    left = [line.left for line in stage_statuses(plan, store, {})]
    assert left == ["", "~2.0h", "~12h", "no run yet", "no run yet", "no run yet"]
