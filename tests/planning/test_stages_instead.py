"""Stages in place of planned ones: whatever names a replaced stage names its replacement."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.planning.stages_instead import with_instead
from hfprune_dist.store.stage import Input, Stage

MODEL = Input("digest", "/model")
PASS = Stage("importance", "m", {}, {"model": MODEL})
PRUNE = Stage(
    "prune", "m 0.2", {"ratio": 0.2}, {"model": MODEL, "importance": replace(PASS.as_input(), identity="part")}
)
EVALUATE = Stage("evaluate", "m 0.2", {}, {"model": PRUNE.as_input(), "dense": MODEL})
SPEED = Stage("efficiency", "m 0.2", {}, {"model": PRUNE.as_input(), "dense": MODEL})
CELL = Cell("m 0.2", "m", 0.2, "it", "entropy", "none", (PASS.id, PRUNE.id), EVALUATE.id, SPEED.id)
PLAN = Plan({it.id: it for it in (PASS, PRUNE, EVALUATE, SPEED)}, (CELL,), (PASS.id,))
# Of an earlier run, which located the same model elsewhere and had another label for it.
MOVED = replace(MODEL, location="/moved")
OTHERS = {
    PASS.id: replace(PASS, version=1, label="n", inputs={"model": MOVED}),
    SPEED.id: replace(SPEED, version=1, label="n 0.2", inputs=SPEED.inputs | {"dense": MOVED}),
}


@given(st.sets(st.sampled_from(sorted(OTHERS))))
def test_whatever_names_a_replaced_stage_names_its_replacement(replaced):
    found = with_instead(PLAN, {stage_id: OTHERS[stage_id] for stage_id in replaced})
    (cell,) = found.cells
    assert [*found.stages] == [it.id for it in found.stages.values()], "each under its own id"
    assert {*cell.producers, cell.evaluate, cell.efficiency, *found.asked} <= {*found.stages}
    assert all(need in found.stages for stage in found.stages.values() for need in stage.needs)
    assert [it.label for it in found.stages.values()] == [it.label for it in PLAN.stages.values()]
    assert {PRUNE.id, EVALUATE.id} <= {*found.stages}, "fingerprints of others stay"
    assert found.asked == cell.producers[:1] and (found == PLAN) == (not replaced)
