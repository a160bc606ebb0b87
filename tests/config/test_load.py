import typing

import pytest
import yaml

from hfprune_dist.config.load import load_config, parse_assignment, parse_list, parse_ratios
from hfprune_dist.core.criteria import CRITERIA, CriterionName
from hfprune_dist.errors import UserError


def write(folder, content):
    file = folder / "sweep.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def test_layers_defaults_file_command_line(tmp_path):
    first = write(tmp_path, {"ratios": [0.3], "calibration": {"samples": 7, "sequence_length": 64}})
    second = tmp_path / "second.yaml"
    second.write_text("calibration: {samples: 9}\n")
    config = load_config([first, second], {"calibration.sequence_length": 32})
    assert config.ratios == [0.3]
    assert (config.calibration.samples, config.calibration.sequence_length) == (9, 32)
    assert config.recovery.rank == 32


@pytest.mark.parametrize("written", ["5e-4", "5.0e-4", "0.0005", "5E-4"])
def test_numbers_with_an_exponent_are_numbers(tmp_path, written):
    in_file = load_config([write(tmp_path, f"recovery: {{learning_rate: {written}}}")], {})
    assert in_file.recovery.learning_rate == 5e-4
    assert parse_assignment(f"recovery.learning_rate={written}") == ("recovery.learning_rate", 5e-4)


@pytest.mark.parametrize(("written", "expected"), [("16", 16), ("1_000", 1000), ("0x10", 16), ("-3", -3), ("0", 0)])
def test_integers_are_integers(written, expected):
    assert parse_assignment(f"a={written}") == ("a", expected)


def test_a_hash_that_looks_like_an_exponent_stays_a_hash(tmp_path):
    in_file = load_config([write(tmp_path, "calibration: {revision: 4e51234}")], {})
    assert in_file.calibration.revision == "4e51234"


def test_the_papers_recipe_is_the_default():
    recovery = load_config([], {}).recovery
    assert (recovery.rank, recovery.alpha, recovery.dropout, recovery.learning_rate) == (32, 64, 0.05, 4e-4)
    assert (recovery.epochs, recovery.batch_size, recovery.weight_decay, recovery.warmup_steps) == (2.0, 128, 0.0, 0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"modles": ["a"]}, ["modles", "did you mean 'models'", "calibration"]),
        ({"calibration": {"sample": 3}}, ["calibration.sample", "samples", "sequence_length"]),
        ({"evaluation": {"fidelity": {"window": 3}}}, ["evaluation.fidelity.window", "windows"]),
        ({"aliases": {"x": {"hub": "a/b"}}}, ["aliases.x.hub", "hub_id"]),
        ({"calibration": {"samples": "many"}}, ["calibration.samples", "integer", "many"]),
        ({"calibration": {"samples": 0}}, ["calibration.samples", "greater than or equal to 1"]),
        ({"calibration": {"samples": 10**22}}, ["calibration.samples", "less than"]),
        ({"runtime": {"collective_timeout_minutes": 10**17}}, ["collective_timeout_minutes", "less than"]),
        ({"calibration": {"path": ""}}, ["calibration.path", "at least 1 character"]),
        ({"evaluation": {"include_path": ""}}, ["evaluation.include_path", "at least 1 character"]),
        ({"calibration": {"path": "a\0b"}}, ["null byte"]),
        ("calibration: {samples: 010}", ["calibration.samples", "integer", "'010'"]),
        ("seed: 12:30", ["seed", "integer", "'12:30'"]),
        ("a: " + 20_000 * "[", ["sweep.yaml", "not valid YAML"]),
        ({"models": []}, ["models", "at least 1"]),
        ({"models": ["a", "a"]}, ["models", "listed twice"]),
        ({"ratios": [1.0]}, ["ratios.0", "less than 1"]),
        ({"ratios": [0]}, ["ratios.0", "greater than 0"]),
        ({"importance": {"criteria": ["entropie"]}}, ["importance.criteria.0", "'entropy'"]),
        ({"recovery": {"method": "lore"}}, ["recovery.method", "'lora'"]),
        ({"aliases": {"x": {}}}, ["aliases.x", "exactly one of path and hub_id"]),
        ("models: [a", ["sweep.yaml", "not valid YAML"]),
        ("- a", ["sweep.yaml", "keys and values"]),
    ],
)
def test_bad_configuration_is_explained(tmp_path, content, expected):
    with pytest.raises(UserError) as caught:
        load_config([write(tmp_path, content)], {})
    for part in expected:
        assert part in str(caught.value)


def test_every_criterion_can_be_configured():
    config = load_config([], {"importance.criteria": list(CRITERIA)})
    assert set(typing.get_args(CriterionName)) == set(CRITERIA) == set(config.importance.criteria)


def test_it_is_known_which_criteria_have_halves():
    without = {name for name, criterion in CRITERIA.items() if not criterion.has_halves}
    assert without == {"entropy_bfloat16", "magnitude", "random"}


def test_every_problem_is_told_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        load_config([write(tmp_path, {"seed": -1, "ratios": [2.0]})], {})
    assert "seed" in str(caught.value) and "ratios.0" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_config([tmp_path / "nowhere.yaml"], {})


def test_paths_are_seen_from_the_file_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    file = write(tmp_path / "here", {"calibration": {"path": "text.jsonl"}, "aliases": {"m": {"path": "../m"}}})
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config([file], {"recovery.path": "pairs.jsonl"})
    assert config.calibration.path == str(tmp_path / "here" / "text.jsonl")
    assert config.aliases["m"].path == str(tmp_path / "m")
    assert config.recovery.path == str(tmp_path / "elsewhere" / "pairs.jsonl")


def test_assignments_are_yaml():
    assert parse_assignment("ratios=[0.2, 0.3]") == ("ratios", [0.2, 0.3])
    assert parse_assignment("recovery.method=none") == ("recovery.method", "none")
    assert parse_assignment("calibration.revision=null") == ("calibration.revision", None)
    for bad in ("samples", "=3", "x=[1"):
        with pytest.raises(UserError, match="--set"):
            parse_assignment(bad)


def test_lists_and_ratios_from_the_command_line():
    assert parse_list("--models", "a, b") == ["a", "b"]
    assert parse_ratios("0.2,.5") == [0.2, 0.5]
    for bad in ("", "a,", ","):
        with pytest.raises(UserError, match="--models"):
            parse_list("--models", bad)
    with pytest.raises(UserError, match="--ratios 'half'"):
        parse_ratios("half")
