"""Names of files that state a licence, and names that only resemble them."""

from string import ascii_lowercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.checkpoints.licences import is_licence

WORDS = st.sampled_from(["license", "licence", "copying", "copyright", "notice", "use_policy"])
LETTERS = st.text(ascii_lowercase, min_size=1, max_size=6)
STARTS = st.one_of(st.just(""), st.builds("{}{}".format, LETTERS, st.sampled_from(["-", "_"])))
ENDS = st.one_of(st.just(""), st.builds("{}{}".format, st.sampled_from([*"-_. 2("]), st.text(max_size=6)))


@st.composite
def in_some_case(draw, word):
    return "".join(draw(st.sampled_from([letter, letter.upper()])) for letter in word)


@given(STARTS, WORDS.flatmap(in_some_case), st.sampled_from(["", "s", "S"]), ENDS)
def test_a_word_for_licences_names_one(start, word, plural, end):
    assert is_licence(f"{start}{word}{plural}{end}")


@given(STARTS, WORDS, LETTERS, ENDS)
def test_a_word_may_be_followed_by_a_capitalized_one(start, word, other, end):
    for written in (word, word.capitalize()):
        assert is_licence(f"{start}{written}{other.capitalize()}{end}")


@given(STARTS, WORDS.flatmap(in_some_case), LETTERS.filter(lambda it: it != "s"), st.sampled_from(["", ".json", ".py"]))
def test_a_word_that_goes_on_is_another(start, word, more, end):
    assert not is_licence(f"{start}{word}{more}{end}")
    assert not is_licence(f"{start}{word.upper()}{more.upper()}{end}")


@given(LETTERS, WORDS.flatmap(in_some_case), ENDS.filter(lambda it: "-" not in it and "_" not in it))
def test_the_end_of_another_word_names_none(before, word, end):
    assert not is_licence(f"{before}{word}{end}")


@pytest.mark.parametrize("name", ["COPYINGv3", "LICENSEv2.txt", "model_licenseV1.1.md"])
def test_a_version_may_follow(name):
    assert is_licence(name)


@pytest.mark.parametrize("name", ["noticed.json", "unlicensed.txt", "licensee.md", "copyrighted.txt", "NOTICED.json"])
def test_words_like_them_name_none(name):
    assert not is_licence(name)
