"""A configuration annotated with the sources of its values is itself a configuration, with the same values."""

import pytest
import yaml

from hfprune_dist.config.load import load_config, merge_layers, read_layers
from hfprune_dist.config.sources import with_sources
from hfprune_dist.config.yaml_text import to_yaml

FIRST = {
    "models": ["a"],
    "aliases": {"a": {"path": "a model"}, "b": {"hub_id": "org/b"}},
    "calibration": {"samples": 8},
}
SECOND = {"calibration": {"samples": 16, "mixture": [{"path": "x"}, {"path": "y: # z", "weight": 2}]}}


@pytest.fixture
def layers(tmp_path):
    files = [tmp_path / "first.yaml", tmp_path / "second.yaml"]
    for file, content in zip(files, (FIRST, SECOND), strict=True):
        file.write_text(yaml.safe_dump(content))
    return read_layers(files, {"ratios": [0.25], "recovery.method": "none"})


def test_every_value_names_what_it_was_taken_from(layers, tmp_path):
    lines = with_sources(merge_layers(layers), layers).splitlines()
    assert f"models: [a]  # {tmp_path / 'first.yaml'}" in lines
    assert f"    path: {tmp_path / 'a model'}  # {tmp_path / 'first.yaml'}" in lines
    assert f"  samples: 16  # {tmp_path / 'second.yaml'}" in lines
    assert "ratios: [0.25]  # command line" in lines and "  method: none  # command line" in lines
    assert "seed: 0" in lines, "a default has no source"
    assert sum(" # " in line for line in lines[1:]) == 7


def test_it_reads_back_as_the_same_configuration(layers, tmp_path):
    config = merge_layers(layers)
    file = tmp_path / "shown.yaml"
    file.write_text(with_sources(config, layers))
    assert load_config([file], {}) == config


def test_defaults_read_back_too(tmp_path):
    file = tmp_path / "shown.yaml"
    file.write_text(with_sources(load_config([], {}), []))
    assert load_config([file], {}) == load_config([], {})


def test_text_that_looks_like_a_number_reads_back_as_text(tmp_path):
    names = ["1e-3", "5E+4", "1e3", "0x1f", "010", "12:30", "1_0", "null", "no", "=", "2024-01-02"]
    config = load_config([], {"aliases": {name: {"path": "/m"} for name in names}, "models": names})
    for number, written in enumerate((with_sources(config, []), to_yaml(config.model_dump()))):
        file = tmp_path / f"{number}.yaml"
        file.write_text(written)
        assert load_config([file], {}) == config
