"""A method's student at a ratio, and the ratios at which there can be none."""

import pytest
import yaml
from sweeps import make_inputs, planned
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.ratios import check_ratios
from hfprune_dist.planning.students import student_of

CRITERION = "coupled_taylor_distilled"


@pytest.mark.parametrize(
    ("ratio", "share", "temperature"),
    [
        *((ratio, 0.4, 0.2) for ratio in (0.05, 0.2, 0.25)),
        *((ratio, 0.42, 0.5) for ratio in (0.26, 0.3, 0.35)),
        *((ratio, 0.1, 0.2) for ratio in (0.36, 0.4, 0.7)),
    ],
)
def test_what_is_left_open_is_as_published_for_the_nearest_ratio(ratio, share, temperature):
    student = student_of(Method(criterion=CRITERION), ratio)
    assert (student.lacks, student.teacher_share, student.teacher_temperature) == (0.025, share, temperature)
    assert student_of(Method(criterion="coupled_taylor"), ratio) is None


def test_a_ratio_at_which_neurons_without_a_score_would_stay_is_refused(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", intermediate_size=100))
    method = Method(criterion=CRITERION)
    least = 2 * 2 * 3 * 32 / checkpoint.parameters
    check_ratios(checkpoint, [least], method, "here")
    check_ratios(checkpoint, [0.9 * least], Method(criterion="coupled_taylor"), "here")
    with pytest.raises(UserError, match=rf"here: ratio .* 0.025 of the neurons or {least:.4f} of all"):
        check_ratios(checkpoint, [0.9 * least], method, "here")


@pytest.fixture(scope="module")
def plan_of(tmp_path_factory):
    """Plans methods, given by name and settings, at these ratios."""
    folder = tmp_path_factory.mktemp("inputs")
    file = make_inputs(folder)

    def plan(ratios, methods, **settings):
        for name, method in methods.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(method))
        files = [str(folder / f"{name}.yaml") for name in methods]
        return planned(file, models=["alpha"], ratios=ratios, methods=files, recovery__method="none", **settings)[1]

    return plan


def importance_of(plan):
    return [it for it in plan.stages.values() if it.kind == "importance"]


def test_all_ratios_share_the_first_pass_and_those_with_like_settings_the_second(plan_of):
    first, *students = importance_of(plan_of([0.1, 0.2, 0.26], {"a": {"criterion": CRITERION}}))
    assert first.params.criteria == ["coupled_taylor"] and len(students) == 2
    assert all(it.inputs["student"].location == first.id and it.needs == [first.id] for it in students)


def test_what_else_is_scored_does_not_move_the_students_fingerprint(plan_of):
    alone = importance_of(plan_of([0.2], {"a": {"criterion": CRITERION}}))
    others = {"b": {"criterion": "weight_taylor", "allocation": "local", "structures": ["neurons", "kv_groups"]}}
    beside = importance_of(plan_of([0.2], {"a": {"criterion": CRITERION}, **others}))
    assert alone[0].id != beside[0].id and alone[1].id == beside[1].id


def test_a_criterion_of_a_student_is_refused_beside_methods(plan_of):
    with pytest.raises(UserError, match=f"importance.criteria: {CRITERION} scores a student.*prune by it instead"):
        plan_of([0.2], {"a": {"criterion": CRITERION}}, importance__criteria=[CRITERION])
