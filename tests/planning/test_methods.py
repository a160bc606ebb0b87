"""Methods by their names, and the tables of what goes together: what a refusal says is possible is."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from families import save_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.load import load_config
from hfprune_dist.config.method import Allocation, Method, Refit
from hfprune_dist.errors import UserError
from hfprune_dist.methods import CRITERIA, SCORED_WHILE_PRUNED
from hfprune_dist.planning.methods import can_do, refuse_criteria, refuse_method, refuse_model, resolve_methods, why_not

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "methods"
TOLD = re.compile(r"(\w+): (null|\[.*?\]|[\w.]+) isn't possible; valid: (.*?)(?:;|$)")
METHODS = st.builds(
    Method,
    criterion=st.sampled_from([None, *CRITERIA, *SCORED_WHILE_PRUNED]),
    prunes_in=st.sampled_from(["calibration", "calibration", "recovery"]),
    structures=st.sampled_from([["neurons"], ["neurons", "kv_groups"], ["neurons", "layers"], ["experts"]]),
    allocation=st.sampled_from(get_args(Allocation)),
    protect_last=st.sampled_from([0, 0, 1]),
    refit=st.sampled_from(get_args(Refit)),
)


def resolved(**overrides):
    return resolve_methods(load_config([], overrides), SHIPPED)


def mended(method, told):
    """Return the method with the first value that a message says is possible."""
    name, value, possible = TOLD.search(told).groups()
    assert yaml.safe_load(value) == getattr(method, name)
    first = yaml.safe_load(re.match(r"\[.*?\]|\w+", possible)[0])
    return method.model_copy(update={name: first})


@settings(max_examples=300)
@given(METHODS)
def test_what_is_said_to_be_possible_mends_a_method(method):
    for _ in range(12):
        try:
            return refuse_method(method, "m")
        except UserError as error:
            told = str(error)
        assert told.startswith("m: with ")
        method = mended(method, told)
    raise AssertionError(told)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Architectures of all kinds that the table knows."""
    folder, names = tmp_path_factory.mktemp("models"), ("llama", "qwen3_moe", "olmo2", "phi3", "cohere2", "llava")
    return {name: open_checkpoint(save_model(folder / name, name)) for name in names}


@settings(max_examples=200)
@given(data=st.data(), method=METHODS)
def test_so_it_does_for_a_model(models, data, method):
    checkpoint = models[data.draw(st.sampled_from(sorted(models)))]
    for _ in range(12):
        why = next(why_not(method, checkpoint), None)
        if why is None:
            return refuse_model(method, checkpoint, "m")
        with pytest.raises(UserError, match=f"^m: {checkpoint.family.model_type} {re.escape(why)}$"):
            refuse_model(method, checkpoint, "m")
        method = mended(method, why)
    raise AssertionError(why)


def test_shipped_methods_are_legal_and_those_for_mixtures_are_listed(models):
    names = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
    methods = resolved(methods=names)
    assert [*methods] == names
    mixture = models["qwen3_moe"]
    assert {name for name, method in methods.items() if not any(why_not(method, mixture))} == {
        *("hfprune", "hfprune-refit", "fisher-refit", "cross-entropy", "wanda-sp", "magnitude", "random"),
        *("hfprune-experts", "reap"),
    }
    assert not can_do(methods["surgeon-plain"], mixture) and can_do(methods["surgeon-plain"], models["llama"])


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_further_criteria_are_those_that_score_what_is_pruned(models, name):
    criterion = CRITERIA[name]
    for model, structures, is_scored in (
        ("llama", ["neurons"], "neurons" in criterion.units),
        ("qwen3_moe", ["neurons"], "expert_neurons" in criterion.units),
        ("qwen3_moe", ["experts"], "experts" in criterion.units),
    ):
        if is_scored and criterion.student_by is None:
            refuse_criteria([name], models[model], structures)
        else:
            with pytest.raises(UserError, match=f"importance.criteria: {name} scores nothing .*; valid: "):
                refuse_criteria([name], models[model], structures)


def test_the_prune_section_wins_over_every_method():
    methods = resolved(methods=["hfprune", "surgeon-plain"], **{"prune.multiple_of": 64, "prune.floor": 0.5})
    assert {(method.multiple_of, method.floor) for method in methods.values()} == {(64, 0.5)}


def test_a_file_of_ones_own_is_found_beside_the_configuration(tmp_path):
    (tmp_path / "mine.yaml").write_text("criterion: fisher_signs\nrefit: layerwise\n")
    (tmp_path / "sweep.yaml").write_text("methods: [hfprune, mine.yaml]\n")
    methods = resolve_methods(load_config([tmp_path / "sweep.yaml"], {}), SHIPPED)
    assert list(methods) == ["hfprune", "mine"] and methods["mine"].refit == "layerwise"


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(UserError, match=r"'surgon-plain'; did you mean 'surgeon-plain'[?]; valid: .*hfprune"):
        resolved(methods=["surgon-plain"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("refit: dense\n", "with prunes_in: calibration, criterion: null isn't possible; valid: entropy,"),
        ("criterion: entropy\nrefits: dense\n", "unknown key 'refits'.*did you mean 'refit'"),
        (
            "criterion: entropy\nallocation: global\nstructures: [neurons, layers]\n",
            "layers. isn't possible; valid: .neurons., .neurons, kv_groups.; layers have",
        ),
        (None, "No such file"),
    ],
)
def test_a_bad_file_is_one_message(tmp_path, content, message):
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=f"(?s)mine.yaml.*{message}"):
        resolved(methods=[str(file)])
