import re
import typing
from functools import reduce
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.config.load import (
    load_config,
    named_path,
    parse_assignment,
    parse_assignments,
    parse_list,
    parse_ratios,
)
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import Section
from hfprune_dist.errors import UserError
from hfprune_dist.methods import CRITERIA, CriterionName

CONFIGS = Path(__file__).parents[2] / "configs"


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


@pytest.mark.parametrize("base", ["demo.yaml", "sweeps/own-model.yaml"])
@pytest.mark.parametrize("suite", ["generative", "paper", "wikitext"])
def test_suites_lie_over_any_configuration(base, suite):
    config = load_config([CONFIGS / base, CONFIGS / "suites" / f"{suite}.yaml"], {})
    fidelity = config.evaluation.fidelity
    assert (fidelity.path is None and fidelity.texts is None) == (suite == "wikitext")


def test_paths_of_several_texts_are_seen_from_their_file(tmp_path):
    texts = {"first": {"path": "own.jsonl"}, "second": {"path": "/news.jsonl"}}
    mixture = [{"path": "a.jsonl"}, {"dataset": "org/b"}]
    content = {"calibration": {"mixture": mixture}, "evaluation": {"fidelity": {"texts": texts}}}
    config = load_config([write(tmp_path, content)], {"evaluation.fidelity.texts.second.split": "test"})
    assert [text.path for text in config.calibration.mixture] == [str(tmp_path / "a.jsonl"), None]
    each = config.evaluation.fidelity.each()
    assert {name: text.path for name, text in each.items()} == {
        "first": str(tmp_path / "own.jsonl"),
        "second": "/news.jsonl",
    }
    assert [text.split for text in each.values()] == ["validation", "test"]
    assert load_config([write(tmp_path, config.model_dump())], {}) == config


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


@pytest.mark.parametrize("section", ["calibration", "evaluation.fidelity"])
def test_a_data_set_is_not_read_with_the_name_and_revision_of_another(tmp_path, section):
    def text(content, **overrides):
        config = load_config(
            [write(tmp_path, content)], {f"{section}.{key}": value for key, value in overrides.items()}
        )
        found = config.calibration if section == "calibration" else config.evaluation.fidelity
        return found.dataset, found.name, found.revision

    assert text("") == ("allenai/c4", "en", None)
    assert text("", name="de") == ("allenai/c4", "de", None)
    assert text("", dataset="org/b") == ("org/b", None, None)
    assert text("", dataset="org/b", name="en") == ("org/b", "en", None)
    *above, last = section.split(".")
    file = {last: {"dataset": "org/a", "name": "x", "revision": "main"}}
    content = {above[0]: file} if above else file
    assert text(content, split="test") == ("org/a", "x", "main")
    assert text(content, dataset="org/b") == ("org/b", None, None)
    assert text(content, dataset="org/b", name="y") == ("org/b", "y", None)


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
        ({"calibration": {"samples": "many"}}, ["calibration.samples: must be a whole number", "(got 'many')"]),
        ({"calibration": {"samples": 10**22}}, ["calibration.samples", "less than"]),
        ({"recovery": {"learning_rate": 1e38}}, ["recovery.learning_rate", "less than"]),
        ({"calibration": {"path": ""}}, ["calibration.path", "at least 1 character"]),
        ({"calibration": {"path": "a\0b"}}, ["null byte"]),
        ("recovery: {learning_rate: 1e9}", ["(got '1e9'); YAML reads this as text"]),
        ("calibration: {samples: 010}", ["calibration.samples", "whole number", "'010'"]),
        ("seed: 12:30", ["seed", "whole number", "'12:30'"]),
        ("a: " + 20_000 * "[", ["sweep.yaml", "not valid YAML"]),
        ({"models": ["a", "a"]}, ["models", "listed twice"]),
        ({"ratios": [1.0]}, ["ratios.0", "less than 1"]),
        ({"importance": {"criteria": ["entropie"]}}, ["importance.criteria.0", "'entropy'"]),
        ({"prune": {"structures": ["layers"]}}, ["prune.structures", "neurons must be among them", "kv_groups"]),
        ({"prune": {"multiple_of": "automatic"}}, ["prune.multiple_of", "or auto (got 'automatic')"]),
        (
            {"recovery": {"micro_batch_size": 0}},
            ["recovery.micro_batch_size", "or auto (got 0)"],
        ),
        ({"prune": {"structures": ["neurons", "neurons"]}}, ["prune.structures", "name each once"]),
        ({"aliases": {"x": {}}}, ["aliases.x", "exactly one of path and hub_id"]),
        (
            {"calibration": {"path": "a", "mixture": [{"path": "b"}, {"path": "c"}]}},
            ["path (", "mixture", "path to null"],
        ),
        ({"calibration": {"mixture": [{"path": "a"}]}}, ["calibration: mixture needs two texts or more"]),
        ({"calibration": {"mixture": [{"path": "a"}, {"path": "./a", "weight": 2}]}}, ["/a is listed twice"]),
        ({"calibration": {"mixture": [{"path": "a", "wight": 1}]}}, ["calibration.mixture.0.wight", "mean 'weight'"]),
        (
            {"calibration": {"samples": 9, "mixture": [{"path": "a"}, {"path": "b", "weight": 0.01}]}},
            ["mixture.1: weight 0.01 comes to none of 9 windows"],
        ),
        ({"evaluation": {"fidelity": {"path": "a", "texts": {"x": {"path": "b"}}}}}, ["path (", "texts to null"]),
        ({"evaluation": {"fidelity": {"texts": {"x/y": {"path": "a"}}}}}, ["evaluation.fidelity.texts.x/y", "digits"]),
        ("- a", ["sweep.yaml", "keys and values", "found a list"]),
        ("importance: []", ["importance: this is a section", "criteria, dtype (got [])"]),
        ("evaluation: {fidelity: null}", ["evaluation.fidelity: this is a section", "windows (got null)"]),
        ("aliases: []", ["aliases: must be a section (got [])"]),
        ("aliases: {x: a/b}", ["aliases.x: this is a section", "hub_id, path, revision (got 'a/b')"]),
        ("aliases: {1: {path: x}}", ["aliases.1: must be a valid string (got 1)"]),
        ("calibration: {samples: true}", ["calibration.samples: must be a whole number (got true)"]),
        *(
            (text, ["sweep.yaml", "not valid YAML"])
            for text in (
                'models: ["a\\udfff"]',
                "calibration: {samples: 0x" + 5000 * "f" + "}",
                "calibration: &a {calibration: *a}",
                "models: &a [*a]",
            )
        ),
        ("models: a,b", ["models: must be a valid list (got 'a,b')"]),
    ],
)
def test_bad_configuration_is_explained(tmp_path, content, expected):
    with pytest.raises(UserError) as caught:
        load_config(2 * [write(tmp_path, content)], {})
    for part in expected:
        assert part in f"{caught.value}\n"


def whole_numbers(section, place=()):
    """Yield the places of the keys that take a whole number."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from whole_numbers(field.annotation, (*place, name))
        elif re.match(r"(?!list).*\bint\b", str(field.annotation)):
            yield (*place, name)


@pytest.mark.parametrize("place", whole_numbers(SweepConfig), ids=".".join)
def test_numbers_that_no_float_can_hold_are_refused(tmp_path, place):
    content = reduce(lambda inner, name: {name: inner}, reversed(place), 10**400)
    with pytest.raises(UserError, match=re.escape(".".join(place))):
        load_config([write(tmp_path, content)], {})


def test_every_criterion_can_be_configured():
    config = load_config([], {"importance.criteria": list(CRITERIA)})
    assert set(typing.get_args(CriterionName)) == set(CRITERIA) == set(config.importance.criteria)


def test_the_order_of_structures_does_not_matter():
    for written in (["neurons", "kv_groups"], ["kv_groups", "neurons"]):
        assert load_config([], {"prune.structures": written}).prune.structures == ["neurons", "kv_groups"]


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


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("models.1", {"models": ["alpha", ""]}),
        ("aliases.x.path", {"aliases": {"x": {"path": ""}}}),
        ("aliases.x.hub_id", {"aliases": {"x": {"hub_id": ""}}}),
        ("calibration.path", {"calibration": {"path": ""}}),
        ("calibration.mixture.0.path", {"calibration": {"mixture": [{"path": ""}]}}),
        ("evaluation.fidelity.texts.x.path", {"evaluation": {"fidelity": {"texts": {"x": {"path": ""}}}}}),
        ("evaluation.include_path", {"evaluation": {"include_path": ""}}),
        *((f"{name}.dataset", {name: {"dataset": ""}}) for name in ("calibration", "recovery")),
        ("evaluation.fidelity.dataset", {"evaluation": {"fidelity": {"dataset": ""}}}),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_nothing_is_meant_by_an_empty_name(tmp_path, monkeypatch, key, content, in_checkpoint):
    """As a path it would be the folder of the file, or the current one, which may be a checkpoint's."""
    if in_checkpoint:
        (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"{re.escape(key)}: must have at least 1 character \(got ''\)"):
        load_config([write(tmp_path, content)], {})


@pytest.mark.parametrize("name", ["alpha", "org/alpha", "./alpha", "sub/alpha/beta"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_models_beside_a_file_are_meant_by_it_whatever_the_current_folder_has(tmp_path, monkeypatch, name, elsewhere):
    for place in ["here", "elsewhere"][: 1 + elsewhere]:
        (tmp_path / place / name).mkdir(parents=True)
        (tmp_path / place / name / "config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    file = write(tmp_path / "here", {"models": [name, "beta"]})
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config([file], {}).models == [str((tmp_path / "here" / name).resolve()), "beta"]


@pytest.mark.parametrize("in_linked_folder", [False, True])
@pytest.mark.parametrize("written", ["./named", "sub/../named", "{}/named", "./named/../named/"])
def test_models_and_methods_are_called_by_the_names_of_their_links(tmp_path, written, in_linked_folder):
    """A snapshot in the hub's cache, to which a link leads, is called by its commit."""
    folder = tmp_path / "real"
    (folder / "0123abcd").mkdir(parents=True)
    (folder / "sub").mkdir()
    (folder / "0123abcd" / "config.json").write_text("{}")
    (folder / "other.yaml").write_text("criterion: entropy")
    (folder / "named").symlink_to("0123abcd")
    (folder / "named.yaml").symlink_to("other.yaml")
    (tmp_path / "linked").symlink_to("real")
    name = written.format(folder)
    method = f"{name.removesuffix('/')}.yaml"
    file = write(tmp_path / ("linked" if in_linked_folder else "real"), {"models": [name], "methods": [method]})
    config = load_config([file], {})
    assert (config.models, config.methods) == ([str(folder / "named")], [str(folder / "named.yaml")])


def test_a_folder_that_is_named_by_where_it_lies_is_called_by_its_own_name(tmp_path):
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("model/sub")
    assert named_path("link/..", tmp_path) == str(tmp_path / "model")
    assert named_path(".", tmp_path / "link") == str(tmp_path / "model" / "sub")


def test_a_link_whose_name_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "\udcff").symlink_to("model")
    with pytest.raises(UserError, match="isn't UTF-8"):
        named_path("\udcff", tmp_path)


@pytest.mark.parametrize("shipped", [False, True])
def test_an_alias_is_no_folder(tmp_path, shipped):
    """Whichever file has it."""
    (tmp_path / "alpha").mkdir()
    (tmp_path / "alpha" / "config.json").write_text("{}")
    (tmp_path / "shipped" / "models").mkdir(parents=True)
    (tmp_path / "aliases").mkdir()
    if shipped:
        (tmp_path / "shipped" / "models" / "alpha.yaml").write_text("hub_id: a/b")
    aliases = write(tmp_path / "aliases", {} if shipped else {"aliases": {"alpha": {"hub_id": "a/b"}}})
    files = [write(tmp_path, {"models": ["alpha"]}), aliases]
    assert load_config(files, {}, tmp_path / "shipped").models == ["alpha"]


def test_a_shipped_file_is_found_by_the_name_it_has_in_a_clone(tmp_path, monkeypatch):
    """Its paths are resolved as if it were there; a file that really is there takes precedence."""
    (tmp_path / "shipped" / "sweeps").mkdir(parents=True)
    write(tmp_path / "shipped" / "sweeps", {"calibration": {"path": "../../runs/text"}, "seed": 1})
    monkeypatch.chdir(tmp_path)
    named = Path("configs/sweeps/sweep.yaml")
    config = load_config([named], {}, tmp_path / "shipped")
    assert (config.seed, config.calibration.path) == (1, str(tmp_path / "runs" / "text"))
    with pytest.raises(UserError, match=r"configs/none\.yaml: No such file"):
        load_config([Path("configs/none.yaml")], {}, tmp_path / "shipped")
    (tmp_path / "configs" / "sweeps").mkdir(parents=True)
    write(tmp_path / "configs" / "sweeps", {"seed": 2})
    assert load_config([named], {}, tmp_path / "shipped").seed == 2


def test_assignments_are_yaml():
    assert parse_assignment("ratios=[0.2, 0.3]") == ("ratios", [0.2, 0.3])
    assert parse_assignment("recovery.method=none") == ("recovery.method", "none")
    assert parse_assignment("calibration.revision=null") == ("calibration.revision", None)
    for bad in ("samples", "=3", "x=[1"):
        with pytest.raises(UserError, match="--set"):
            parse_assignment(bad)


def written(section, key, value, whole):
    """Return an argument of --set: of a section's key, or of a section that has this key alone."""
    return f"{section}={{{key}: {value}}}" if whole else f"{section}.{key}={value}"


@given(st.lists(st.tuples(st.sampled_from(["samples", "shard_size"]), st.integers(1, 99), st.booleans())))
def test_later_assignments_win_key_by_key_in_whichever_way_they_are_written(drawn):
    assignments = [written("calibration", *it) for it in drawn]
    calibration = load_config([], parse_assignments(assignments)).calibration
    expected = {"samples": 1024, "shard_size": 4} | {key: value for key, value, _ in drawn}
    assert calibration.model_dump(include={*expected}) == expected


def test_lists_and_ratios_from_the_command_line():
    assert parse_list("--models", "a, b") == ["a", "b"]
    assert parse_ratios("0.2,.5") == [0.2, 0.5]
    for bad in ("", "a,", ","):
        with pytest.raises(UserError, match="--models"):
            parse_list("--models", bad)
    with pytest.raises(UserError, match="--ratios 'half'"):
        parse_ratios("half")


def test_what_is_merged_may_itself_have_been_merged(tmp_path):
    file = tmp_path / "anchors.yaml"
    file.write_text(
        "evaluation: {fidelity: {texts: {a: &a {path: a, text_field: x}, b: &b {<<: *a, path: b}}}}\n"
        "calibration: {<<: *b, samples: 3}\n"
    )
    config = load_config([file], {})
    assert (config.calibration.path, config.calibration.text_field) == (str(tmp_path / "b"), "x")
    file.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(UserError, match="the key 'seed' appears twice"):
        load_config([file], {})


@pytest.mark.parametrize("value", ["2024-13-45", "!!int ''", "!!bool maybe", "!!timestamp soon"])
def test_values_that_their_tags_do_not_allow_are_refused(value):
    with pytest.raises(UserError, match="is not a YAML value"):
        parse_assignment(f"seed={value}")
