"""KAR: the adaptor against plain loops, and which states see a text about their history."""

import json

import planted_texts
import polars as pl
import pytest
import tiny
import torch
from torch import nn

from laserrec.config import KARConfig
from laserrec.data.losses import LossWarning
from laserrec.methods.all import METHODS, Given
from laserrec.methods.kar import KAR, HybridExperts, _key, _longer, expert
from laserrec.methods.parts import ItemVectors
from laserrec.util.errors import UserError

SMALL = KARConfig(**{**tiny.RIVALS["kar"], "d_model": 8, "dropout": 0.0})
N = 12


def test_experts_are_weighed_by_the_softmax_of_the_gate():
    torch.manual_seed(0)
    shared = nn.ModuleList(expert(SMALL, 5) for _ in range(2))
    adaptor, text = HybridExperts(SMALL, shared, 5), torch.randn(5)
    outputs = [one[2](one[0](text).clamp(min=0)) for one in [*shared, *adaptor.own]]
    gates = (adaptor.gate.weight @ text + adaptor.gate.bias).exp()
    assert len(outputs) == len(gates) == 4
    wanted = sum(gate * output for gate, output in zip(gates / gates.sum(), outputs, strict=True))
    torch.testing.assert_close(adaptor(text[None])[0], wanted)


def model(beginnings: list[list[int]]) -> KAR:
    torch.manual_seed(1)
    made = KAR(SMALL, N, 5, len(beginnings)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    made.item_facts = ItemVectors(made.facts, (torch.randn(N, 5),))
    if beginnings:
        made.know(beginnings, torch.randn(len(beginnings), 5))
    return made


def test_items_are_trained_vectors_and_facts():
    made = model([])
    assert made.preferences is None
    torch.testing.assert_close(made.items()[4], made.item.weight[4] + made.facts(made.item_facts.inputs[0][4:5])[0])


def test_a_text_is_seen_from_the_last_item_that_it_is_made_of():
    """No state sees a text that knew what comes after it."""
    beginnings = [[3], [3, 5, 2], [7, 8]]
    made = model(beginnings)
    items = torch.tensor([[3, 5, 2, 4], [3, 5, 4, 2], [7, 9, 8, 1], [7, 8, N, N], [3, N, N, N]])
    text, since = made.begun(items)
    longest = [[3, 5, 2], [3], None, [7, 8], [3]]
    for row, begun in enumerate(longest):
        if begun is None:
            assert text[row] == -1
        else:
            assert made.keys[text[row]] == _key(begun) and since[row] == len(begun) - 1
    plain = made.body(made.item(items) + made.item_facts(items))
    added = made.states(items) - plain
    for row, begun in enumerate(longest):
        seen = [] if begun is None else range(len(begun) - 1, 4)
        for place in range(4):
            wanted = made.preferences(made.texts[text[row]][None])[0] if place in seen else torch.zeros(8)
            torch.testing.assert_close(added[row, place], wanted, atol=1e-5, rtol=1e-4)


def test_the_hash_is_the_same_in_python_and_in_torch():
    key = torch.zeros(1, dtype=torch.long)
    for item in (2**31, 0, 5, 123_456_789):
        key = _longer(key, torch.tensor([item]))
    assert key.item() == _key([2**31, 0, 5, 123_456_789])


@pytest.fixture
def folder(tmp_path):
    """Texts about all items and about two beginnings, one of them with an unknown item."""
    rows = planted_texts.items()["item_id"].to_list()
    texts = [{"item_id": name, "text": f"it is {planted_texts.WORDS[row // planted_texts.EACH]}"}
             for row, name in enumerate(rows)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    histories = [{"history": rows[:2], "text": "likes red"}, {"history": ["gone"], "text": "likes saw"}]
    (tmp_path / "histories.jsonl").write_text("".join(json.dumps(text) + "\n" for text in histories))
    return tmp_path


def test_texts_of_a_folder_are_what_it_reads(folder):
    """Titles that tell nothing, and texts of the folder that tell the class: the planted case is learnt from them."""
    config = tiny.config("x", kar=tiny.RIVALS["kar"] | {"knowledge": str(folder)})
    blank = planted_texts.items().with_columns(title=pl.lit(f"thing {planted_texts.WORDS[0]}"))
    made = METHODS["kar"].make(Given(config, blank, planted_texts.N, planted_texts.Texts()))
    assert made.keys.tolist() == [_key([0, 1])]
    assert planted_texts.learnt("kar", blank, seeds=1, knowledge=str(folder)) > 0.9
    assert planted_texts.learnt("kar", blank, seeds=1) < 0.4


def test_texts_about_other_items_are_told(folder):
    config = tiny.config("x", kar=tiny.RIVALS["kar"] | {"knowledge": str(folder)})
    ours = planted_texts.items()

    def made(items):
        return METHODS["kar"].make(Given(config, items, planted_texts.N, planted_texts.Texts()))

    half = pl.when(pl.col("item") < planted_texts.N // 2).then("item_id").otherwise(pl.lit("x") + pl.col("item_id"))
    with pytest.warns(LossWarning, match=r"21 of 42 texts are about other items and are not used: ids have"):
        assert made(ours.with_columns(item_id=half)).keys.tolist() == [_key([0, 1])]
    with pytest.raises(UserError, match=r"none of its \d+ texts is about these items: .*letters before the number"):
        made(ours.with_columns(item_id=pl.lit("x") + pl.col("item_id")))


def test_texts_of_histories_alone_beside_vectors_of_the_items_own(folder, monkeypatch):
    """All texts are read alike, so the items' own vectors stay out."""
    (folder / "items.jsonl").unlink()
    known = (folder / "histories.jsonl").read_text().splitlines()[0]
    (folder / "histories.jsonl").write_text(known)
    config = tiny.config("x", kar=tiny.RIVALS["kar"] | {"knowledge": str(folder)})
    features = planted_texts.Texts()
    wide = features.vectors(planted_texts.items()).repeat(1, 2)
    monkeypatch.setattr(features, "vectors", lambda items: wide)
    model = METHODS["kar"].make(Given(config, planted_texts.items(), planted_texts.N, features))
    assert len(model.keys) == 1 and model.users(tiny.histories([0, 1, 2])).isfinite().all()


def test_other_texts_are_another_fit(folder):
    config = tiny.config("x", kar={"knowledge": str(folder)})
    first = METHODS["kar"].reads(config)
    moved = folder.rename(folder.with_name("moved"))
    assert METHODS["kar"].reads(tiny.config("x", kar={"knowledge": str(moved)})) == first
    moved.rename(folder)
    (folder / "histories.jsonl").unlink()
    assert METHODS["kar"].reads(config) != first and METHODS["kar"].reads(tiny.config("x")) == ""
