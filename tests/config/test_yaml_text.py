"""What is wrong with a YAML file is told in words that fit it. What values come to is tested with configurations."""

import pytest

from hfprune_dist.config.yaml_text import NotYamlError, read_yaml, yaml_value
from hfprune_dist.errors import UserError


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_a_file_in_another_encoding_is_to_be_saved_as_utf_8(tmp_path, encoding):
    file = tmp_path / "sweep.yaml"
    file.write_bytes("models: [caf\N{LATIN SMALL LETTER E WITH ACUTE}]".encode(encoding))
    with pytest.raises(UserError, match=r"--config .*sweep\.yaml: not valid YAML: not UTF-8 .*; save it as UTF-8"):
        read_yaml(file, "--config", "keys")


@pytest.mark.parametrize("text", ["a: [", "a: 1\na: 2", "a: \t- b", "a: !!int x", "? [", "a: 2024-13-45"])
def test_an_error_tells_the_place_and_no_name_that_the_text_lacks(text):
    with pytest.raises(NotYamlError, match=r"line \d, column \d") as caught:
        yaml_value(text)
    assert "string>" not in str(caught.value)
