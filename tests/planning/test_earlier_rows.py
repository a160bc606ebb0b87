"""Rows of earlier runs: those of another checkpoint can't stay beside a model that has its name."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_stages import stage_of

from hfprune_dist.errors import UserError
from hfprune_dist.planning.plan import Cell, Plan, refuse_other_checkpoints, with_earlier_rows
from hfprune_dist.store.stage import Input

OUT = Path("runs/my")
ALPHA = Input("of alpha", "/models/alpha", content="checkpoint")
OTHER = Input("of another", "/other/alpha", content="checkpoint")
COPY = replace(ALPHA, location="/copy/alpha")
ON_HUB = Input("of a commit", "/hub/snapshots/0123", content="commit")


def plan_of(models, ratios=(0.1,), methods=("hfprune",)):
    """The plan of a sweep: model's name -> its checkpoint."""
    stages, cells = {}, []
    for name, dense in models.items():
        for ratio, method in [(None, None), *((ratio, method) for ratio in ratios for method in methods)]:
            label = f"{name} dense" if ratio is None else f"{name} {ratio} {method}"
            made = stage_of("prune", label, {"ratio": ratio or 0.5, "of": method}, {"model": dense})
            model = made.as_input() if ratio else dense
            stage = stage_of("evaluate", label, {}, {"model": model, "dense": dense})
            stages |= {it.id: it for it in ([made, stage] if ratio else [stage])}
            cells.append(Cell(label, name, ratio, method, method, "none", (made.id,) if ratio else (), stage.id))
    return Plan(stages, tuple(cells))


@pytest.mark.parametrize(
    "today",
    [
        plan_of({"alpha": OTHER}, [0.2]),
        plan_of({"alpha": replace(ALPHA, identity="of what it is now")}, [0.2]),
        plan_of({"alpha": ON_HUB}, methods=["theirs"]),
        plan_of({"beta": ALPHA, "alpha": OTHER}, []),
    ],
)
def test_rows_of_another_checkpoint_of_that_name_can_not_stay(today):
    earlier = plan_of({"beta": ALPHA, "alpha": ALPHA}, [0.1, 0.3])
    with pytest.raises(UserError) as refused:
        refuse_other_checkpoints(today, earlier, OUT)
    assert str(refused.value).startswith(f"--out {OUT}: its row 'alpha 0.1 hfprune', which stays, is of another")
    assert str(refused.value).endswith(": --forget 'alpha 0.1 hfprune'")


@pytest.mark.parametrize(
    "today",
    [
        plan_of({"alpha": OTHER}),
        plan_of({"alpha": OTHER}, [0.1, 0.3], ["theirs", "hfprune"]),
        plan_of({"alpha": COPY}, [0.2]),
        plan_of({"other": OTHER}, [0.2]),
        plan_of({"beta": ON_HUB}, [0.2]),
    ],
)
def test_they_may_all_be_replaced_and_rows_of_the_same_checkpoint_stay(today):
    earlier = plan_of({"alpha": ALPHA})
    refuse_other_checkpoints(today, earlier, OUT)
    together = with_earlier_rows(today, earlier)
    identities = {(cell.model, together.stages[cell.evaluate].inputs["dense"].identity) for cell in together.cells}
    assert len(identities) == len({name for name, _ in identities})
