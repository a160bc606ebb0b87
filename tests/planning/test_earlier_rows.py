"""Rows of earlier runs: those of another checkpoint can't stay beside a model that has its name."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_stages import stage_of

from hfprune_dist.errors import UserError
from hfprune_dist.planning.earlier_rows import refuse_other_checkpoints, with_earlier_rows
from hfprune_dist.planning.plan import Cell, Plan
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


EARLIER = plan_of({"alpha": ALPHA})
REFUSED = {
    "another ratio": plan_of({"alpha": OTHER}, [0.2]),
    "a commit": plan_of({"alpha": ON_HUB}, [0.2]),
    "another method": plan_of({"alpha": OTHER}, methods=["theirs"]),
    "beside another model": plan_of({"beta": ALPHA, "alpha": OTHER}, [0.2]),
    "nothing but the dense row": plan_of({"alpha": OTHER}, []),
}
ALLOWED = {
    "all rows are replaced": plan_of({"alpha": OTHER}),
    "and more are added": plan_of({"alpha": OTHER}, [0.1, 0.3], ["theirs", "hfprune"]),
    "the same checkpoint": plan_of({"alpha": ALPHA}, [0.2]),
    "a copy": plan_of({"alpha": COPY}, [0.2]),
    "another name": plan_of({"other": OTHER}, [0.2]),
    "no model of that name": plan_of({"beta": ON_HUB}, [0.2]),
}


class TestOtherCheckpoints:
    @pytest.mark.parametrize("today", REFUSED.values(), ids=REFUSED)
    def test_are_refused_if_rows_of_the_first_would_stay(self, today):
        with pytest.raises(UserError) as refused:
            refuse_other_checkpoints(today, EARLIER, OUT)
        said = str(refused.value)
        assert said.startswith(f"--out {OUT}: its rows 'alpha 0.1 hfprune', which") and "not /models/alpha" in said
        assert said.endswith("--forget 'alpha 0.1 hfprune'")
        by_path = today is not REFUSED["a commit"]
        alias = f"path={OTHER.location}" if by_path else "hub_id=ORG/MODEL"
        assert f"(--set aliases.NAME.{alias} --models NAME)" in said

    @pytest.mark.parametrize("today", ALLOWED.values(), ids=ALLOWED)
    def test_may_replace_all_rows_of_the_first(self, today):
        refuse_other_checkpoints(today, EARLIER, OUT)
        together = with_earlier_rows(today, EARLIER)
        identities = {(cell.model, together.stages[cell.evaluate].inputs["dense"].identity) for cell in together.cells}
        assert len(identities) == len({name for name, _ in identities})


def test_rows_to_remove_are_those_of_the_model_and_have_the_labels_of_the_folder():
    earlier = plan_of({"beta": ALPHA, "alpha": ALPHA}, [0.1, 0.3])
    with pytest.raises(UserError) as refused:
        refuse_other_checkpoints(plan_of({"beta": COPY, "alpha": OTHER}, methods=["theirs"]), earlier, OUT)
    said = str(refused.value)
    assert said.endswith(": --forget 'alpha 0.1 hfprune' --forget 'alpha 0.3 hfprune'") and "beta" not in said


def test_a_checkpoint_that_changed_in_its_folder_is_another():
    changed = replace(ALPHA, identity="of what it is now")
    with pytest.raises(UserError, match=r"\(/models/alpha, whose files have changed since\)"):
        refuse_other_checkpoints(plan_of({"alpha": changed}, [0.2]), plan_of({"alpha": ALPHA}), OUT)
