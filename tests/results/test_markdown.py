"""Texts in Markdown, as a parser renders them."""

from operator import itemgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hfprune_dist.results.markdown import Column, code, escaped, markdown, on_one_line, table

ODD = st.text(alphabet="ab1 _*`<>[](){}!|\\~&;#$-+.\n", min_size=1).filter(str.strip)
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def inline(text):
    """The parts of a rendered line: (kind, text) of each."""
    (line,) = [token for token in PARSER.parse(text) if token.type == "inline"]
    return [(part.type, part.content) for part in line.children if part.content]


def cells(text):
    lines = [token.children for token in PARSER.parse(text) if token.type == "inline"]
    return ["".join(part.content for part in line) for line in lines]


@given(ODD)
def test_a_text_reads_as_it_is(text):
    parts = inline(f"# name: {escaped(text)}")
    assert {kind for kind, _ in parts} <= {"text", "text_special"}
    assert "".join(shown for _, shown in parts) == f"name: {on_one_line(text)}"


@given(ODD.filter(lambda text: "`" not in text))
def test_code_reads_as_it_is(text):
    parts = [("text", "name: "), ("code_inline", on_one_line(text)), ("text", ", then")]
    assert inline(f"name: {code(text)}, then") == parts
    assert code(f"{text}`") == escaped(f"{text}`"), "no code span, but it reads as it is"


@given(st.lists(ODD, min_size=2, max_size=4))
def test_cells_read_as_they_are(texts):
    expected = [on_one_line(text) for text in texts]
    columns = [Column(text, itemgetter(place)) for place, text in enumerate(texts)]
    assert cells(markdown([texts], columns)) == expected * 2
    assert cells(table([""] * len(texts), [[*map(code, texts)]])) == [""] * len(texts) + expected


@pytest.mark.parametrize("name", ["surgeon-plain", "crows_pairs_english", "down_proj", "(h * dL/dh)^2", "Qwen2.5"])
def test_usual_names_need_no_escape(name):
    assert (escaped(name), code(name)) == (name, f"`{name}`")
