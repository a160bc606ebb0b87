import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.planning.plan import Cell
from hfprune_dist.results.checkpoint_names import LONGEST, checkpoint_names, with_digits


def cell(model="llama", ratio=0.2, method="hfprune", recovery="lora"):
    return Cell("", model, ratio, method, None, recovery, ("recover/1",), "evaluate/1")


def test_a_name_is_made_like_a_label():
    plain, control = cell(), cell(ratio=None, method=None)
    assert checkpoint_names([plain, control]) == {"llama-0.2-lora": plain, "llama-dense-lora": control}
    other = cell(method="surgeon", recovery="none")
    assert [*checkpoint_names([plain, other, control])] == [
        "llama-0.2-hfprune-lora",
        "llama-0.2-surgeon",
        "llama-dense-lora",
    ]


def test_the_dense_model_is_the_users_own():
    assert checkpoint_names([Cell("llama dense", "llama", None, None, None, "none", (), "evaluate/1")]) == {}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("a/../b c", "a-b-c-0.2-lora"), (".hidden", "hidden-0.2-lora"), ("模 a", "a-0.2-lora")),
        *(("a..-..b", "a-b-0.2-lora"), ("a/../../b", "a-b-0.2-lora"), ("a...--..-...b.c", "a-b.c-0.2-lora")),
    ],
)
def test_unsafe_characters_are_left_out(model, name):
    assert [*checkpoint_names([cell(model)])] == [name]


def test_a_model_of_whose_name_nothing_is_left_gets_digits():
    rows = [cell("模型"), cell("型")]
    first, second = checkpoint_names(rows)
    assert first == with_digits("model-0.2-lora", rows[0]) != second


def test_rows_whose_names_would_be_the_same_are_told_apart_whatever_the_order():
    rows = [cell("a b"), cell("A_b"), cell("a-B")]
    names = checkpoint_names(rows)
    assert len({name.casefold() for name in names}) == 3 and "A_b-0.2-lora" in names
    assert checkpoint_names(rows[::-1]) == names
    assert names[with_digits("a-b-0.2-lora", rows[0])] == rows[0]


def test_whatever_tells_rows_apart_tells_their_names_apart():
    rows = [cell(), cell(ratio=0.2 + 1e-9), cell(method="hf prune"), cell(method="hf-prune")]
    rows += [cell(recovery="none"), cell(recovery="own")]
    names = checkpoint_names(rows)
    assert len(names) == len(rows) and all("llama-0.2-hf" in name for name in names)


MODELS = st.text("aA.-_ /模\n", max_size=8) | st.sampled_from(["a..-..a", "a" * 100, "a" * 120, "A" * 120])


@settings(max_examples=60, deadline=None)
@given(st.lists(MODELS, min_size=1, max_size=4, unique=True), st.sampled_from(["lora", "none"]))
def test_every_row_has_a_name_that_file_systems_and_the_hub_allow(models, recovery):
    rows = [cell(model, recovery=recovery) for model in models]
    names = checkpoint_names(rows)
    assert sorted(names.values(), key=rows.index) == rows
    assert len({name.casefold() for name in names}) == len(rows)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) and len(name) <= LONGEST
        assert ".." not in name and "--" not in name and not name.endswith((".", "-"))
