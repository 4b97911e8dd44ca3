"""The text the LLM reads: the paper's words, the variants, and bounds that hold for any title."""

import polars as pl
import pytest
import tiny

from laserrec.config import Layout, PromptConfig, Template
from laserrec.data.prompt import PromptEncoder, item_line

TOKENIZER = tiny.tokenizer()
PAPER = ("You are an intelligent recommendation assistant. Please summarize the user's characteristics into a single "
         "token based on the browsing history. In chronological order, the user has browsed the following items:")
LINES = "\n\n>> 1. red saw (brand: redco, category: tools)\n\n>> 2. glue"
ITEMS = pl.DataFrame({"title": ["red saw", "glue"], "brand": ["redco", None], "category": ["tools", None]})
LONG = {"max_item_tokens": 500}


def text(as_item: bool = False, items: pl.DataFrame = ITEMS, **settings) -> str:
    encoder = PromptEncoder(TOKENIZER, PromptConfig(**{**LONG, **settings}))
    return TOKENIZER.decode(encoder.history(encoder.item_tokens(items), as_item))


def test_the_papers_text():
    assert text() == PAPER + LINES


@pytest.mark.parametrize(("template", "start"), [
    (Template.NO_SINGLE_TOKEN, PAPER.replace(" into a single token", "")),
    (Template.NO_INSTRUCTION, ""),
    (Template.ITEM_INSTRUCTION, PAPER),
])
def test_variants_of_table_6(template, start):
    assert text(template=template) == start + LINES


def test_an_item_has_its_own_instruction_in_one_variant_only():
    for template in Template:
        as_item, as_user = text(True, template=template), text(False, template=template)
        if template == Template.ITEM_INSTRUCTION:
            assert as_item.startswith("You are an intelligent recommendation assistant. Please summarize the item ")
            assert as_item.endswith(LINES)
        else:
            assert as_item == as_user


def test_shared_texts_carry_no_number():
    encoder = PromptEncoder(TOKENIZER, PromptConfig(layout=Layout.TEXT_FIRST))
    tokens = encoder.item_tokens(ITEMS)
    assert TOKENIZER.decode(encoder.block(tokens[1])) == "\n\n>> glue"
    assert encoder.block(tokens[1], 2).tolist() == encoder.block(tokens[1], 1).tolist()


def test_only_the_last_items_are_written_and_counted_from_one():
    items = pl.DataFrame({"title": [f"item {n}" for n in range(7)]})
    got = text(items=items, max_items=3, template=Template.NO_INSTRUCTION, attributes=())
    assert got == "\n\n>> 1. item 4\n\n>> 2. item 5\n\n>> 3. item 6"


def test_a_line_is_cut_at_its_end():
    encoder = PromptEncoder(TOKENIZER, PromptConfig(max_item_tokens=5))
    whole = PromptEncoder(TOKENIZER, PromptConfig(**LONG)).item_tokens(ITEMS)
    assert [t.tolist() for t in encoder.item_tokens(ITEMS)] == [t[:5].tolist() for t in whole]
    assert len(whole[0]) > 5


@pytest.mark.parametrize("title", ["x" * 10_000, "锤子 " * 3_000, "\U0001f528" * 10_000, "a" + " " * 10_000 + "b"])
def test_any_length_of_title_is_bounded(title):
    encoder = PromptEncoder(TOKENIZER, PromptConfig(max_item_tokens=16))
    tokens = encoder.item_tokens(pl.DataFrame({"title": [title], "brand": ["b" * 10_000]}))[0]
    whole = TOKENIZER(item_line({"title": title, "brand": "b" * 10_000}, ("brand",)), add_special_tokens=False)
    assert tokens.tolist() == whole["input_ids"][:16]


def test_any_script_survives():
    title = "Schlüssel 锤子 \U0001f528 кран"
    items = pl.DataFrame({"title": [title], "brand": ["Ünlü"], "category": [None]})
    assert text(items=items, template=Template.NO_INSTRUCTION) == f"\n\n>> 1. {title} (brand: Ünlü)"


@pytest.mark.parametrize(("row", "line"), [
    ({"title": "saw", "brand": "b", "category": "c"}, "saw (brand: b, category: c)"),
    ({"title": "saw", "brand": None, "category": "c"}, "saw (category: c)"),
    ({"title": "saw", "brand": "b", "category": ""}, "saw (brand: b)"),
    ({"title": "saw", "brand": None, "category": None}, "saw"),
    ({"title": "saw", "brand": "  "}, "saw"),
    ({"title": " two\n\tlines  "}, "two lines"),
    ({"title": "nuts &amp; bolts"}, "nuts & bolts"),
    ({"title": None}, "untitled"),
    ({"title": " ", "brand": "b"}, "untitled (brand: b)"),
    ({"title": "saw", "colour": "red"}, "saw"),
])
def test_item_line(row, line):
    assert item_line(row, ("brand", "category")) == line


def test_attributes_are_written_in_the_order_asked_for():
    row = {"title": "saw", "brand": "b", "category": "c", "colour": "red"}
    assert item_line(row, ("colour", "brand")) == "saw (colour: red, brand: b)"
    assert item_line(row, ()) == "saw"


def test_no_items_give_no_tokens():
    assert PromptEncoder(TOKENIZER, PromptConfig()).item_tokens(ITEMS.head(0)) == []


def test_special_tokens_in_a_title_are_text():
    """A title must not be able to end the prompt."""
    encoder = PromptEncoder(TOKENIZER, PromptConfig())
    tokens = encoder.item_tokens(pl.DataFrame({"title": ["saw <eos> red"]}))[0]
    assert TOKENIZER.eos_token_id not in tokens.tolist()
    assert TOKENIZER.decode(tokens) == "saw <eos> red"
