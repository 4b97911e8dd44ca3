"""Tensors and facts in one file, whole or not at all."""

import pytest
import torch
from kills import kill_at_every_step
from safetensors.torch import save_file

from laserrec.util import checkpoint, io
from laserrec.util.errors import UserError


def test_what_goes_in_comes_out(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b.c": torch.tensor(5), "empty": torch.empty(0), "rng": torch.get_rng_state(),
               "turned": torch.randn(3, 4).T, "half": torch.randn(2).bfloat16()}
    shared = torch.randn(4)
    tensors |= {"one": shared, "view": shared[1:]}
    facts = {"epoch": 3, "log": [{"x": None, "y": 0.1}], "title": "ü"}
    checkpoint.save(tmp_path / "new" / "x.safetensors", tensors, facts)
    got, got_facts = checkpoint.load(tmp_path / "new" / "x.safetensors")
    assert got_facts == facts
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[n], tensors[n]) and got[n].dtype == tensors[n].dtype for n in tensors)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def test_no_facts_are_an_empty_dict(tmp_path):
    checkpoint.save(tmp_path / "x", {"a": torch.ones(1)})
    assert checkpoint.load(tmp_path / "x")[1] == {}


def test_a_save_that_breaks_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    checkpoint.save(file, {"a": torch.ones(2)}, {"n": 1})

    def half(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(file, {"a": torch.zeros(2)}, {"n": 2})
    tensors, facts = checkpoint.load(file)
    assert facts == {"n": 1} and torch.equal(tensors["a"], torch.ones(2))


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", b"\xff" * 100])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match="x is damaged or not a safetensors file"):
        checkpoint.load(tmp_path / "x")


def test_a_cut_file_is_named(tmp_path):
    checkpoint.save(tmp_path / "x", {"a": torch.randn(100)})
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[:-40])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load(tmp_path / "none")


def test_an_optimiser_goes_on_as_if_never_stopped():
    def walk(stop_at: int | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(2, 2))]
        groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:]}]
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        for step in range(6):
            if step == stop_at:
                kept = {n: t.clone() for n, t in checkpoint.optimizer_tensors(optimizer).items()}
                optimizer = torch.optim.AdamW(groups, lr=0.1)
                checkpoint.restore_optimizer(optimizer, kept)
            optimizer.zero_grad()
            sum((p - 1).square().sum() for p in parameters).backward()
            optimizer.step()
        return parameters

    whole, resumed = walk(None), walk(3)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_part_takes_a_whole_name_before_the_dot():
    tensors = {"laser.a.b": torch.ones(1), "lasers.a": torch.zeros(1), "best.a": torch.zeros(1)}
    assert list(checkpoint.part(tensors, "laser")) == ["a.b"]


def test_killed_at_any_step_the_old_or_the_new_file_is_there(tmp_path):
    file = tmp_path / "x"
    checkpoint.save(file, {"a": torch.zeros(3)})
    found = set()

    def work():
        io._clean_once.cache_clear()
        checkpoint.save(file, {"a": torch.ones(3)})

    def look(step):
        found.add(float(checkpoint.load(file)[0]["a"].sum()))
        checkpoint.save(file, {"a": torch.zeros(3)})

    assert kill_at_every_step(work, look) > 5 and found == {0.0, 3.0}
    work()
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and file.stat().st_mode & 0o044


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, path, metadata: save_file(tensors, "/dev/full/x"))
    with pytest.raises(UserError, match=r"x can't be written: .*; make room on the disk or name another place"):
        checkpoint.save(tmp_path / "x", {"a": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []
