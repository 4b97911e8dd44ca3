"""An index's folder: whole after any kill, and a damaged or forged one is a clear message, never a crash."""

import json
import os

import numpy as np
import pytest
import torch
from kills import kill_at_every_step

from laserrec.retrieval import graph
from laserrec.retrieval.build import build_index, fill_index
from laserrec.retrieval.folder import index_folder, index_kind, load_index, make_index
from laserrec.retrieval.index import IndexKind
from laserrec.util import manifest
from laserrec.util.errors import UserError

D = 8
FILES = {IndexKind.EXACT: "vectors.safetensors", IndexKind.USEARCH: "graph.usearch"}


@pytest.fixture(params=list(IndexKind))
def kind(request):
    return request.param


@pytest.fixture(params=list(FILES))
def stored(request, tmp_path, vectors, live):
    """(folder, kind) of an index whose vectors are in the folder."""
    save_index(fill_index(vectors, live, request.param), tmp_path / "index")
    return tmp_path / "index", request.param


def save_index(index, folder):
    with index_folder(folder) as write:
        write(index, "")


def place(kind, server):
    return {"url": server} if kind == IndexKind.QDRANT else {}


def alter(folder, **facts):
    """Change facts of index.json; a value None takes them out."""
    known = json.loads((folder / "index.json").read_text()) | facts
    (folder / "index.json").write_text(json.dumps({name: fact for name, fact in known.items() if fact is not None}))


@pytest.mark.parametrize("shared", [False, True])
def test_saved_and_loaded(kind, vectors, live, queries, server, tmp_path, shared):
    index = fill_index(vectors, live, kind, **place(kind, server))
    save_index(index, tmp_path / "index")
    opened = [load_index(tmp_path / "index", shared) for _ in range(3)]
    for again in opened:
        assert again.kind == index.kind and len(again) == 28 and again.d == D
        for how in ({}, {"allowed": live[8:20].tolist()}, {"excluded": [live[5:9].numpy()] * 5}):
            np.testing.assert_array_equal(again.search(queries, 9, **how)[0], index.search(queries, 9, **how)[0])
    assert index_kind(tmp_path / "index") == kind
    assert not list(tmp_path.rglob("*.pkl")) and sorted(p.name for p in (tmp_path / "index").iterdir()) == sorted(
        ["index.json", *FILES.get(kind, "").split()])


def test_an_empty_index(kind, server, tmp_path):
    save_index(make_index(kind, D, **place(kind, server)), tmp_path / "index")
    again = load_index(tmp_path / "index", shared=True)
    assert len(again) == 0 and (again.search(np.eye(D, dtype=np.float32), 3)[0] == -1).all()


def test_built_again_after_a_kill_at_any_step(kind, vectors, live, queries, server, tmp_path):
    def build():
        build_index(vectors, live, kind, tmp_path / "index", queries, 3, **place(kind, server))

    def look(step):
        if (tmp_path / "index").exists():
            assert len(load_index(tmp_path / "index")) == 28
        build()
        assert len(load_index(tmp_path / "index", shared=True)) == 28
        assert [p.name for p in tmp_path.iterdir()] == ["index"]
        if step % 2:  # the next one is killed with no folder there, or with an old one
            for file in (tmp_path / "index").iterdir():
                file.unlink()
            (tmp_path / "index").rmdir()

    assert kill_at_every_step(build, look, every=3) >= 5


def test_no_other_folder_is_replaced(vectors, live, tmp_path):
    index = fill_index(vectors, live, IndexKind.EXACT)
    for content in ("{}", '{"name": "web"}', "no json"):
        (tmp_path / "web").mkdir(exist_ok=True)
        (tmp_path / "web" / "index.json").write_text(content)
        with pytest.raises(UserError, match="web is not empty and is not replaced"):
            save_index(index, tmp_path / "web")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; name a folder"):
        save_index(index, tmp_path / "file")


def test_an_earlier_version_says_so_and_is_replaced(vectors, live, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "index.json").write_text('{"kind": "usearch", "d": 3}')
    (tmp_path / "old" / "graph.usearch").write_bytes(b"x")
    with pytest.raises(UserError, match="has format 1 and this version reads format 2; build the index again"):
        load_index(tmp_path / "old")
    save_index(fill_index(vectors, live, IndexKind.EXACT), tmp_path / "old")
    assert len(load_index(tmp_path / "old")) == 28


def test_no_pickle_is_opened(tmp_path):
    """A folder of the Qdrant client's own storage, which an earlier version made, ran what its maker wanted."""
    (tmp_path / "collection").mkdir()
    (tmp_path / "index.json").write_text('{"kind": "qdrant", "d": 3, "url": null, "collection": "items", "format": 2}')
    with pytest.raises(UserError, match="lacks the url of the Qdrant server"):
        load_index(tmp_path)
    with pytest.raises(UserError, match="kept on a server; give its url"):
        save_index(make_index(IndexKind.QDRANT, 3), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("facts", [
    {"kind": "magic"}, {"kind": 3}, {"kind": None}, {"d": "8"}, {"d": 0}, {"d": -1}, {"d": 10**30}, {"d": 1e3},
    {"items": 10**12}, {"items": -1}, {"items": "28"}, {"files": []}, {"files": {}}, {"files": {"a": 1}},
    {"files": {"../x": {"bytes": 1, "sha256": ""}}}, {"format": 99}, {"format": "2"}, {"format": None}, {"url": 7},
    {"d": 9}, {"items": 27}, {"d": 2**20}, {"items": 2**40 - 1}])
def test_forged_facts(stored, facts):
    alter(stored[0], **facts)
    with pytest.raises(UserError, match="index again") as error:
        load_index(stored[0])
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"x"', "{", "[" * 100_000, '{"kind": {"a": []}}', "\x00"])
def test_junk_in_place_of_index_json(stored, text):
    (stored[0] / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is damaged: .*; build the index again"):
        load_index(stored[0])


def test_a_damaged_file_is_named(stored):
    folder, kind = stored
    file = folder / FILES[kind]
    data = file.read_bytes()
    for content, message in ((b"", "cut short"), (data[: len(data) // 2], "cut short"), (data + b"x", "has changed"),
                             (bytes([data[0] ^ 1]) + data[1:], "its sha256 is")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{file.name} .*{message}.*; build the index again"):
            load_index(folder, shared=True)
    file.unlink()
    with pytest.raises(UserError, match="is missing; build the index again"):
        load_index(folder)


def test_links_are_not_followed(stored, tmp_path):
    folder, kind = stored
    for name in (FILES[kind], "index.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is a link, which is not followed"):
            load_index(folder)
    os.unlink(folder / "index.json")
    with pytest.raises(UserError, match="is not a finished index; make one with"):
        load_index(folder)


def test_a_forged_file_under_a_fitting_checksum(stored):
    """Whoever changes the file can change the checksum too: flipped bytes, cuts and other files are refused by what is
    in them, or do no harm."""
    folder, kind = stored
    file, rng = folder / FILES[kind], np.random.default_rng(0)
    data, refused = np.frombuffer(file.read_bytes(), np.uint8), 0
    for trial in range(400):
        forged = data.copy()
        if trial < 300:
            forged[rng.integers(len(data), size=rng.integers(1, 4))] = rng.integers(0, 256)
        else:
            forged = forged[: rng.integers(len(data))] if trial < 350 else np.concatenate([forged, forged[:trial]])
        file.write_bytes(forged.tobytes())
        alter(folder, files=manifest.describe(folder, [file.name]))
        try:
            load_index(folder, shared=True).search(np.eye(D, dtype=np.float32), 5)
        except UserError as error:
            assert str(error).endswith("again")
            refused += 1
    assert refused >= 100


def test_every_link_of_a_graph_is_looked_at(tmp_path):
    """A link to node 40 of 40 (there is none), in each used place of each list of the lowest layer."""
    index, angle = make_index(IndexKind.USEARCH, 2), torch.linspace(0, 3, 40)
    index.add(np.arange(40), torch.stack([angle.cos(), angle.sin()], dim=1).numpy())
    index.write(tmp_path)
    file = tmp_path / "graph.usearch"
    graph.check_file(file, 2, 40)
    data, levels = file.read_bytes(), 8 + 40 * 8 + 64 + 40
    start = levels + 2 * 40
    for level in np.frombuffer(data[levels:start], "<i2").tolist():
        count = int.from_bytes(data[start + 10 : start + 14], "little")
        for at in {start + 10, start + 14, start + 10 + 4 * count}:
            file.write_bytes(data[:at] + (40 if at > start + 10 else 65).to_bytes(4, "little") + data[at + 4 :])
            with pytest.raises(UserError, match=r"graph.usearch is damaged or of .* links of layer 0 lead nowhere"):
                graph.check_file(file, 2, 40)
        start += 14 + 4 * 64 + level * (4 + 4 * 32)
    assert start == len(data)
