"""The texts' keys and values: on the disk they are those in memory, and leave nothing behind."""

import pytest
import tiny
import torch

from laserrec.methods.laser import texts as module
from laserrec.methods.laser.texts import Texts
from laserrec.util.errors import UserError

ROWS = tiny.histories([0, 1, 2], [6], [3, 8, 1, 4, 7], [10, 11])


def read(llm, **prompt) -> Texts:
    made = Texts(llm(), tiny.config("x", prompt={"layout": "text_first", **prompt}).prompt, tiny.items(8))
    made.add(tiny.items(20)[8:])
    return made


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LASERREC_CACHE", str(tmp_path))
    return tmp_path / "texts"


def on_disk(texts: Texts, cache) -> bool:
    with open("/proc/self/maps") as maps:
        return f"{cache}/" in maps.read()


def test_keys_and_values_on_the_disk_are_those_in_memory(llm, cache):
    memory, disk = read(llm, text_cache_gib=1.0), read(llm, text_cache_gib=0.0)
    used = memory._used
    assert disk._used == used and on_disk(disk, cache) and not list(cache.iterdir())
    assert torch.equal(memory._cache.keys[:, :used], disk._cache.keys[:, :used])
    assert torch.equal(memory._cache.values[:, :used], disk._cache.values[:, :used])
    del disk
    assert not on_disk(memory, cache)


def test_scores_are_equal_to_the_last_bit(llm, cache):
    memory, disk = (tiny.laser(llm(), prompt={"layout": "text_first", "text_cache_gib": gib}).eval()
                    for gib in (1.0, 0.0))
    assert on_disk(disk.texts, cache)
    with torch.no_grad():
        assert torch.equal(memory.reader.read(ROWS)[0], disk.reader.read(ROWS)[0])


def test_by_itself_it_goes_to_the_disk_where_half_of_memory_is_too_little(llm, cache, monkeypatch):
    size = 2 * read(llm)._cache.keys.nbytes
    for free, there in ((3 * size, False), (size, True)):
        monkeypatch.setattr(module, "available_bytes", lambda free=free: free)
        texts = read(llm)
        assert on_disk(texts, cache) == there
        del texts


def test_a_disk_that_is_full_is_one_line(llm, cache, monkeypatch):
    def full(file, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=r"^.*texts can't be written: No space left on device; make room on the disk$"):
        read(llm, text_cache_gib=0.0)
