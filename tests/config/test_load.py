"""Configurations from files and flags: what wins, where paths lead, what is refused and how that is told."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.config.load import from_command_line, load_config, parse_assignments
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import Section
from hfprune_dist.config.yaml_text import to_yaml
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
    assert config.ratios == [0.3] and config.recovery.rank == 32
    assert (config.calibration.samples, config.calibration.sequence_length) == (9, 32)


def test_the_papers_recipe_is_the_default():
    config = load_config([], {})
    tasks, datasets = config.evaluation, (config.calibration.dataset, config.recovery.dataset)
    assert (len(tasks.tasks), tasks.num_fewshot, tasks.add_bos_token) == (10, 0, True)
    assert datasets == ("allenai/c4", "MBZUAI/LaMini-instruction")
    recovery = config.recovery.trainings()["lora"]
    assert (recovery.rank, recovery.alpha, recovery.dropout, recovery.learning_rate) == (32, 64, 0.05, 4e-4)
    assert (recovery.epochs, recovery.batch_size, recovery.weight_decay, recovery.warmup_steps) == (2.0, 128, 0.0, 0)


def test_a_configuration_that_was_written_reads_back_as_the_same(tmp_path):
    names = ["1e-3", "5E+4", "1e3", "0x1f", "010", "12:30", "1_0", "null", "no", "=", "2024-01-02", "y: # z"]
    config = load_config([], {"aliases": {name: {"path": "/m"} for name in names}, "models": names})
    assert load_config([write(tmp_path, to_yaml(config.model_dump()))], {}) == config


@pytest.mark.parametrize(
    ("written", "expected"), [("5e-4", 5e-4), ("5E-4", 5e-4), ("1_000", 1000), ("4e51234", "4e51234"), ("0", 0)]
)
def test_numbers_are_numbers_and_a_hash_that_looks_like_one_is_none(written, expected):
    assert parse_assignments([f"a={written}"]) == {"a": expected}


@pytest.mark.parametrize("section", ["calibration", "evaluation.fidelity"])
def test_a_data_set_is_not_read_with_the_name_and_revision_of_another(tmp_path, section):
    *above, last = section.split(".")

    def text(own=None, **overrides):
        content = {above[0]: {last: own}} if above else {last: own}
        given = {f"{section}.{key}": value for key, value in overrides.items()}
        config = load_config([write(tmp_path, content)] if own else [], given)
        found = config.evaluation.fidelity if above else config.calibration
        return found.dataset, found.name, found.revision

    assert text(name="de") == ("allenai/c4", "de", None)
    assert text(dataset="org/b") == ("org/b", None, None)
    own = {"dataset": "org/a", "name": "x", "revision": "main"}
    assert text(own, split="test") == ("org/a", "x", "main")
    assert text(own, dataset="org/b", name="y") == ("org/b", "y", None)
    file = write(tmp_path, {"calibration": {"path": "/a"}})
    written = load_config([file], {}).model_dump()
    for base in ({"calibration": {"path": "/a"}}, written):  # the last source that is named is the one that counts
        file = write(tmp_path, base)
        assert load_config([file], {"calibration.path": "/b"}).calibration.path == "/b"
        assert load_config([file], {"calibration.path": None}).calibration == load_config([], {}).calibration
        over = load_config([file], {"calibration.dataset": "org/b"}).calibration
        assert (over.path, over.dataset, over.name) == (None, "org/b", None)


@given(st.lists(st.tuples(st.sampled_from(["samples", "shard_size"]), st.integers(1, 99), st.booleans())))
def test_later_assignments_win_key_by_key_in_whichever_way_they_are_written(drawn):
    written = [
        f"calibration={{{key}: {number}}}" if whole else f"calibration.{key}={number}" for key, number, whole in drawn
    ]
    calibration = load_config([], parse_assignments(written)).calibration
    expected = {"samples": 1024, "shard_size": 4} | {key: value for key, value, _ in drawn}
    assert {"samples": calibration.samples, "shard_size": calibration.shard_size} == expected


def test_a_later_assignment_of_another_source_replaces_the_former():
    data_set = {"dataset": "org/b", "name": None, "path": None}
    for first in ("calibration.path=a.jsonl", "calibration={dataset: org/a, name: x}"):
        calibration = load_config([], parse_assignments([first, "calibration.dataset=org/b"])).calibration
        assert {key: getattr(calibration, key) for key in data_set} == data_set


# Paths.


def test_paths_are_seen_from_the_file_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "here" / "org" / "model").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    texts = {"first": {"path": "own.jsonl"}, "second": {"path": "/news.jsonl"}}
    content = {
        "models": ["org/model", "org/hub", "./named", "alias"],
        "methods": ["hfprune", "mine.yaml"],
        "calibration": {"mixture": [{"path": "a.jsonl"}, {"dataset": "org/b"}]},
        "evaluation": {"fidelity": {"texts": texts}},
        "aliases": {"m": {"path": "../m"}},
        "runtime": {"engine_pythons": {"vllm": "python3", "llama.cpp": "venv/bin/python"}},
    }
    file = write(tmp_path / "here", content)
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config([file], {"recovery.path": "pairs.jsonl", "evaluation.fidelity.texts.second.split": "test"})
    here = tmp_path / "here"
    assert config.models == [str(here / "org" / "model"), "org/hub", str(here / "named"), "alias"]
    assert config.methods == ["hfprune", str(here / "mine.yaml")]
    assert [text.path for text in config.calibration.mixture] == [str(here / "a.jsonl"), None]
    assert config.aliases["m"].path == str(tmp_path / "m")
    pythons = {"vllm": "python3", "llama.cpp": str(here / "venv" / "bin" / "python")}
    assert config.runtime.engine_pythons == pythons, "a mere name is looked up in PATH"
    assert config.recovery.path == str(tmp_path / "elsewhere" / "pairs.jsonl")
    each = config.evaluation.fidelity.each()
    assert [(text.path, text.split) for text in each.values()] == [
        (str(here / "own.jsonl"), "validation"),
        ("/news.jsonl", "test"),
    ]
    assert load_config([write(tmp_path, config.model_dump())], {}) == config
    assert from_command_line({"recovery.path": "pairs.jsonl"})["recovery"]["path"] == config.recovery.path


def test_a_shipped_file_is_found_by_the_name_it_has_in_a_clone(tmp_path, monkeypatch):
    """Its paths are resolved as if it were there; a file that really is there takes precedence."""
    (tmp_path / "shipped" / "sweeps").mkdir(parents=True)
    write(tmp_path / "shipped" / "sweeps", {"calibration": {"path": "../../runs/text"}, "seed": 1})
    monkeypatch.chdir(tmp_path)
    named = Path("configs/sweeps/sweep.yaml")
    config = load_config([named], {}, tmp_path / "shipped")
    assert (config.seed, config.calibration.path) == (1, str(tmp_path / "runs" / "text"))
    (tmp_path / "configs" / "sweeps").mkdir(parents=True)
    write(tmp_path / "configs" / "sweeps", {"seed": 2})
    assert load_config([named], {}, tmp_path / "shipped").seed == 2


# What is refused.


def leaves(section, place=()):
    """Yield the places of all keys that hold no section."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaves(field.annotation, (*place, name))
        else:
            yield ".".join((*place, name))


@pytest.mark.parametrize("value", [{"a": {"b": []}}, [["x"]], 10**400, float("nan")], ids=type)
def test_a_value_of_another_kind_is_refused_with_its_key(value):
    for key in leaves(SweepConfig):
        with pytest.raises(UserError) as caught:
            load_config([], {key: value})
        lines = str(caught.value).splitlines()[1:]
        assert lines and all(re.match(rf"  (unknown key ')?{re.escape(key)}\b", line) for line in lines)


def test_an_unknown_key_is_refused_with_those_that_are_valid():
    for key in leaves(SweepConfig):
        with pytest.raises(UserError) as caught:
            load_config([], {f"{key}x": 1})
        name = key.rpartition(".")[2]
        told = re.search("unknown key '(.*)'; did you mean '(.*)'[?]; valid keys: (.*)", str(caught.value))
        assert told[1] == f"{key}x" and name in told[3].split(", ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"seed": -1, "ratios": [2.0]},
            ["seed: must be greater than or equal to 0 (got -1)\n", "ratios.0: must be less"],
        ),
        ({"ratios": [0.2, 0.20000001]}, ["ratios: 0.2 is listed twice"]),
        ({"prune": {"multiple_of": "some"}}, ["multiple_of: must be a whole number (got 'some')", "must be 'auto'"]),
        ({"calibration": {"path": "a", "mixture": [{"path": "b"}, {"path": "c"}]}}, ["path (", "mixture to null"]),
        ({"calibration": {"mixture": [{"path": "a", "wight": 1}]}}, ["calibration.mixture.0.wight", "mean 'weight'"]),
        ("calibration: {samples: true}", ["calibration.samples: must be a whole number (got true)"]),
        ("- a", ["sweep.yaml: expected keys and values", "found a list"]),
        ("a: [", ["sweep.yaml: not valid YAML", "line 1, column 5"]),
        ('models: ["a\\udfff"]', ["sweep.yaml: not valid YAML"]),
        ("models: &a [*a]", ["sweep.yaml: not valid YAML"]),
        ("seed: 1\nseed: 2", ["the key 'seed' appears twice", "line 1, column 1"]),
    ],
)
def test_bad_configuration_is_explained(tmp_path, content, expected):
    with pytest.raises(UserError) as caught:
        load_config([write(tmp_path, content)], {})
    for part in expected:
        assert part in f"{caught.value}\n"


def test_a_file_that_is_not_there_or_not_utf_8_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file"):
        load_config([tmp_path / "nowhere.yaml"], {})
    (tmp_path / "sweep.yaml").write_bytes("models: [caf\N{LATIN SMALL LETTER E WITH ACUTE}]".encode("latin-1"))
    with pytest.raises(UserError, match=r"sweep\.yaml: not valid YAML: 'utf-8' codec"):
        load_config([tmp_path / "sweep.yaml"], {})
