"""Items and histories as key-value text."""

import polars as pl
import pytest
import tiny

from laserrec.config import RecFormerConfig
from laserrec.methods.attribute_text import CLS, KEY, VALUE, Attributes

ITEMS = pl.DataFrame({"title": ["red saw", "blue drill of steel", " "], "brand": ["redco", None, "woodco"],
                      "category": [None, None, "tools"]})


@pytest.fixture
def read(llm):
    def make(**settings):
        return Attributes(llm(), RecFormerConfig(**{"max_items": 3, "max_tokens": 64} | settings), ITEMS)

    return make


def words(llm, attributes, tokens) -> str:
    return llm().tokenizer.decode([t for t in tokens.tolist() if t < attributes.cls])


def test_an_item_is_its_attributes_names_and_values_without_the_unknown(read, llm):
    attributes = read()
    texts = attributes.read(tiny.histories([0], [1], [2]))
    assert [words(llm, attributes, row[real]) for row, real in zip(texts.tokens, texts.real, strict=True)] == [
        "title: red sawbrand: redco", "title: blue drill of steel", "title: untitledbrand: woodcocategory: tools"]
    assert (texts.tokens[:, 0] == attributes.cls).all() and (texts.types[:, 0] == CLS).all()
    for kind, said in ((KEY, "title: brand: "), (VALUE, "red sawredco")):
        assert words(llm, attributes, texts.tokens[0][texts.real[0] & (texts.types[0] == kind)]) == said


def test_the_newest_item_stands_first_and_the_oldest_are_left_out(read, llm):
    attributes = read()
    texts = attributes.read(tiny.histories([2, 2, 1, 0], [1], []))
    assert words(llm, attributes, texts.tokens[0][texts.places[0] == 1]).startswith("title: red saw")
    assert words(llm, attributes, texts.tokens[0][texts.places[0] == 2]).startswith("title: blue")
    assert int(texts.places[0].max()) == 3 and texts.places[0][texts.real[0]].diff().min() >= 0
    assert texts.real.sum(dim=1).tolist() == [1 + int(attributes.lengths[[0, 1, 2]].sum()),
                                              1 + int(attributes.lengths[1]), 1]
    short = read(max_tokens=10).read(tiny.histories([2, 1, 0], [1]))
    assert short.tokens.shape == (2, 10) and (short.tokens[0] == texts.tokens[0, :10]).all()


def test_long_values_are_cut_and_items_come_and_go(read):
    attributes = read(attribute_tokens=4)
    assert attributes.lengths.tolist() == [8, 4, 12]
    before = attributes.read(tiny.histories([0, 1, 2])).tokens
    attributes.add(ITEMS.head(1))
    assert len(attributes) == 4
    assert (attributes.read(tiny.histories([3])).tokens == attributes.read(tiny.histories([0])).tokens).all()
    attributes.truncate(3)
    assert len(attributes) == 3 and (attributes.read(tiny.histories([0, 1, 2])).tokens == before).all()
