"""Tensors in a file that has no name."""

import errno
import os

import pytest
import torch

from laserrec.util import mapped as module
from laserrec.util.errors import UserError
from laserrec.util.mapped import mapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_holds_the_numbers_and_leaves_nothing(tmp_path, dtype):
    wanted = torch.randn(2, 300, 4).to(dtype)
    found = mapped((2, 300, 4), dtype, tmp_path / "texts")
    found.copy_(wanted)
    assert torch.equal(found, wanted) and found.is_contiguous()
    with open("/proc/self/maps") as maps:
        assert f"{tmp_path}/texts/" in maps.read()
    assert not list((tmp_path / "texts").iterdir())


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    def full(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"/texts can't be written: No space left on device; make room on the disk$"):
        mapped((10,), torch.float32, tmp_path / "texts")


def test_a_full_disk_where_space_can_not_be_reserved(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    mapped((10,), torch.float32, tmp_path)[:] = 1.0
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 39}))
    with pytest.raises(UserError, match="No space left on device"):
        mapped((10,), torch.float32, tmp_path)
