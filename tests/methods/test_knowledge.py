"""Texts for KAR: what is asked, what is kept, and that nothing but training histories is told."""

import json

import pytest
import tiny

from laserrec.config import PromptConfig
from laserrec.methods import knowledge
from laserrec.methods.knowledge import Writer, read_knowledge, write_knowledge
from laserrec.util.device import CPU
from laserrec.util.errors import UserError

DATA = tiny.planted(12, users=10)


class Told:
    """In the LLM's place: numbered answers; the prompts are kept. It may be stopped after some."""

    def __init__(self, *_, stop_after: int | None = None):
        self.prompts, self.left = [], stop_after

    def __call__(self, prompts):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.prompts += prompts
        return [f"answer {len(prompt)}" for prompt in prompts]


@pytest.fixture
def write(tmp_path, monkeypatch, llm):
    def call(told=None, **numbers):
        told = told or Told()
        monkeypatch.setattr(knowledge, "Writer", lambda *_: told)
        return write_knowledge(DATA, tmp_path / "k", llm().config, PromptConfig(), CPU, progress=False, **numbers), told

    return call


def test_prompts_tell_items_and_the_first_half_of_training_histories(write):
    found, told = write(items=None, histories=100)
    assert len(found.items) == 12 and len(told.prompts) == 12 + len(found.histories)
    titles = dict(zip(DATA.items["item_id"], DATA.items["title"], strict=True))
    assert all(any(title in prompt for prompt in told.prompts[:12]) for title in titles.values())
    ids = DATA.items["item_id"].to_list()
    trained = {tuple(ids[row] for row in rows) for rows in DATA.train_sequences.lists()}
    halves = {rows[: max(1, len(rows) // 2)] for rows in trained}
    assert set(found.histories) == halves
    for begun, prompt in zip(found.histories, told.prompts[12:], strict=True):
        listed = [line.split(". ", 1)[1].split(" (")[0] for line in prompt.splitlines()[1 : 1 + len(begun)]]
        assert listed == [titles[name] for name in begun]


def test_it_goes_on_where_it_was_stopped_and_adds_to_what_is_there(write, tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge, "_AT_ONCE", 2)
    with pytest.raises(KeyboardInterrupt):
        write(Told(stop_after=2), items=6, histories=3)
    kept = read_knowledge(tmp_path / "k").items
    assert len(kept) == 4
    file = tmp_path / "k" / "items.jsonl"
    file.write_text(file.read_text().replace(next(iter(kept.values())), "my own words"))
    found, told = write(items=6, histories=3)
    assert len(told.prompts) == 2 + 3 and "my own words" in found.items.values()
    more, told = write(items=8, histories=3)
    assert len(told.prompts) == 2 and found.items.items() <= more.items.items()
    assert write(items=8, histories=3)[1].prompts == [] and more.sha256 != found.sha256


def test_files_that_editors_wrote(tmp_path):
    """With a byte order mark, blank lines, other line ends and characters at which some programs break lines."""
    lines = ['\ufeff{"item_id": "a", "text": "one\u2028two\u0085three"}', "", '{"item_id": "b", "text": "four"}', " "]
    (tmp_path / "items.jsonl").write_bytes("\r\n".join(lines).encode())
    assert read_knowledge(tmp_path).items == {"a": "one\u2028two\u0085three", "b": "four"}


def test_a_folder_that_can_not_be_written_is_told_before_the_llm_is_loaded(write, tmp_path):
    (tmp_path / "k").write_text("a file")
    told = Told()
    with pytest.raises(UserError, match="is a file; name a folder"):
        write(told, items=2, histories=2)
    assert not told.prompts


@pytest.mark.parametrize(("name", "line", "said"), [
    ("items.jsonl", "{", "is no JSON"), ("items.jsonl", '{"item_id": 3, "text": "x"}', "needs item_id"),
    ("items.jsonl", '{"item_id": "3"}', "and text"), ("histories.jsonl", '{"history": [], "text": "x"}', "1 to 10"),
    ("histories.jsonl", json.dumps({"history": ["a"] * 11, "text": "x"}), "1 to 10 item ids"),
    ("histories.jsonl", '{"history": [1], "text": "x"}', "list of 1 to 10"), ("items.jsonl", "[" * 9999, "no JSON"),
])
def test_lines_that_are_no_texts(tmp_path, name, line, said):
    good = {"items.jsonl": '{"item_id": "a", "text": "b"}', "histories.jsonl": '{"history": ["a"], "text": "b"}'}[name]
    (tmp_path / name).write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=rf"{name}, line 2.*{said}"):
        read_knowledge(tmp_path)


def test_a_folder_without_texts(tmp_path):
    with pytest.raises(UserError, match=r"holds neither items.jsonl nor histories.jsonl; make it with laserrec know"):
        read_knowledge(tmp_path)


def test_the_llm_writes_the_same_text_alone_and_among_others(llm_folder, llm):
    """Greedy, padded on the left, one line."""
    write = Writer(llm().config, CPU, tokens=6)
    prompts = ["red saw", "a blue hammer and some more words", "x"]
    together = write(prompts)
    assert together == [write([prompt])[0] for prompt in prompts]
    assert all("\n" not in text for text in together) and any(together)
