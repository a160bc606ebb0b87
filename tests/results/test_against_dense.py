"""The share of the dense model's quality that a checkpoint keeps."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.results.against_dense import AVERAGES, add_shares_of_dense
from hfprune_dist.store.stage import Input, Stage

CHECKPOINTS = {"dense": (), "dense + lora": ("recover/1",), "cut": ("prune/2",), "cut + lora": ("prune/2", "recover/3")}


def plan_of(limits):
    """Return a plan in which those checkpoints are evaluated with each of these limits."""
    stages, cells = {}, []
    for limit in limits:
        for name, producers in CHECKPOINTS.items():
            stage = Stage("evaluate", name, {"limit": limit}, {"model": Input(name, name), "dense": Input("d", "d")})
            stages[stage.id] = stage
            ratio, method = (None, None) if name.startswith("dense") else (0.2, "x")
            recovery = "lora" if "lora" in name else "none"
            cells.append(Cell(f"{name} {limit}", "m", ratio, method, method, recovery, producers, stage.id))
    return Plan(stages, tuple(cells))


def row_of(score):
    return {**dict.fromkeys(AVERAGES, score), "tasks": {"t": {} if score is None else {"acc": score}}}


SCORES = st.none() | st.floats(0.01, 1)


@given(scores=st.lists(SCORES, min_size=8, max_size=8))
def test_shares_are_of_the_dense_row_that_was_measured_alike(scores):
    plan, rows = plan_of([1, 2]), [row_of(score) for score in scores]
    add_shares_of_dense(rows, plan)
    for first in (0, 4):
        whole = scores[first]
        for score, row in zip(scores[first : first + 4], rows[first : first + 4], strict=True):
            known = None not in (score, whole)
            assert row["average_of_dense"] == (pytest.approx(score / whole) if known else None)
            assert row["tasks_of_dense"] == ({"t": pytest.approx(score / whole)} if known else {})
        bare = [row["average_of_dense_before_recovery"] for row in rows[first : first + 4]]
        assert bare == [None, rows[first]["average_of_dense"], None, rows[first + 2]["average_of_dense"]]


def test_each_model_has_a_dense_row_of_its_own():
    plan = plan_of([1])
    others = tuple(replace(cell, model="other") for cell in plan.cells)
    rows = [row_of(score) for score in (0.8, 0.8, 0.6, 0.4, 0.5, 0.5, 0.1, 0.2)]
    add_shares_of_dense(rows, Plan(plan.stages, (*plan.cells, *others)))
    assert [row["average_of_dense"] for row in rows] == pytest.approx([1, 1, 0.75, 0.5, 1, 1, 0.2, 0.4])


def test_without_a_dense_row_there_are_no_shares():
    plan = plan_of([1])
    alone = Plan(plan.stages, plan.cells[3:])
    (row,) = rows = [row_of(0.5)]
    add_shares_of_dense(rows, alone)
    assert {row[key] for key in row if "of_dense" in key and key != "tasks_of_dense"} == {None}
    assert row["tasks_of_dense"] == {}
