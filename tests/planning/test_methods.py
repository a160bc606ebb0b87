from pathlib import Path

import pytest

from hfprune_dist.config.load import load_config
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.methods import resolve_methods

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "methods"


def resolved(**overrides):
    return resolve_methods(load_config([], overrides), SHIPPED)


def test_every_shipped_method_resolves():
    names = [file.stem for file in SHIPPED.glob("*.yaml")]
    assert set(resolved(methods=names)) == set(names) >= {"hfprune", "surgeon-plain"}


def test_hfprune_is_the_published_method():
    method = resolved(methods=["hfprune"])["hfprune"]
    assert (method.criterion, method.allocation, method.refit, method.multiple_of) == ("entropy", "uniform", "none", 1)


@pytest.mark.parametrize("refit", ["none", "bias", "dense", "layerwise", "block"])
def test_a_quick_refit_leaves_out_what_a_thorough_one_does_besides(refit):
    quick, thorough = (Method(criterion="entropy", refit=refit, effort=it).of_one_cut() for it in ("quick", "thorough"))
    beside = ["refit_copies", "refit_iterations", "refit_norms"]
    assert not quick.keys() & {*beside} and {**quick, **thorough} == thorough
    assert sorted(thorough.keys() - quick.keys()) == {
        "block": beside,
        "layerwise": beside[::2],
        "dense": beside[:1],
    }.get(refit, [])


def test_the_prune_section_wins_over_every_method():
    methods = resolved(methods=["hfprune", "surgeon-plain"], **{"prune.multiple_of": 64, "prune.floor": 0.5})
    assert {(it.multiple_of, it.floor) for it in methods.values()} == {(64, 0.5)}


def test_a_file_of_ones_own_is_found_beside_the_configuration(tmp_path):
    (tmp_path / "mine.yaml").write_text("criterion: fisher_signs\nrefit: layerwise\n")
    (tmp_path / "sweep.yaml").write_text("methods: [hfprune, mine.yaml]\n")
    methods = resolve_methods(load_config([tmp_path / "sweep.yaml"], {}), SHIPPED)
    assert list(methods) == ["hfprune", "mine"] and methods["mine"].refit == "layerwise"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("criterion: entropi\n", "criterion"),
        ("refit: dense\n", "with prunes_in: calibration, criterion: null isn't possible; entropy,"),
        ("criterion: entropy\nrefits: dense\n", "unknown key 'refits'.*did you mean 'refit'"),
        (
            "criterion: entropy\nallocation: global\nstructures: [neurons, layers]\n",
            "layers. isn't possible; .neurons. and .neurons, kv_groups. are; layers have",
        ),
        ("criterion: entropy\nfloor: -0.1\n", "floor.*greater than or equal to 0"),
        ("criterion: entropy\nprotect_last: 1.5\n", r"protect_last: must be less than 1 .got 1.5"),
        ("criterion: entropy\nprotect_first: -1\n", r"protect_first: must be greater than or equal to 0 .got -1"),
        ("- entropy\n", "expected the keys of a method"),
        ("a: [\n", "not valid YAML"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_is_one_message(tmp_path, content, message):
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=f"(?s)mine.yaml.*{message}"):
        resolved(methods=[str(file)])


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(
        UserError, match=r"unknown method 'surgon-plain'.*did you mean 'surgeon-plain'.*valid: .*hfprune"
    ):
        resolved(methods=["surgon-plain"])


def test_two_methods_of_one_name_are_refused(tmp_path):
    (tmp_path / "hfprune.yaml").write_text("criterion: fisher_signs\n")
    with pytest.raises(UserError, match="two methods are called 'hfprune'"):
        resolved(methods=["hfprune", str(tmp_path / "hfprune.yaml")])
