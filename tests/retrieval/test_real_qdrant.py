"""A real Qdrant server, where there is one: the program `qdrant` on the PATH, or a url in QDRANT_URL."""

import os
import shutil
import socket
import subprocess
import time
import urllib.request
import warnings

import numpy as np
import pytest
import torch

from laserrec.retrieval.build import build_index, fill_index
from laserrec.retrieval.folder import load_index
from laserrec.retrieval.index import IndexKind
from laserrec.util.errors import UserError

_MISSING = ("NOT TESTED: an index on a real Qdrant server; put the program qdrant on the PATH or set QDRANT_URL to a "
            "server that may be written to")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    program, given = shutil.which("qdrant"), os.environ.get("QDRANT_URL")
    if given:
        yield given
        return
    if program is None:
        warnings.warn(_MISSING, pytest.PytestWarning, stacklevel=1)  # the summary tells warnings, not skips
        pytest.skip(_MISSING)
    ports = [_free_port(), _free_port()]
    place = tmp_path_factory.mktemp("qdrant")
    settings = {"QDRANT__SERVICE__HOST": "127.0.0.1", "QDRANT__SERVICE__HTTP_PORT": str(ports[0]),
                "QDRANT__SERVICE__GRPC_PORT": str(ports[1]), "QDRANT__TELEMETRY_DISABLED": "true",
                "QDRANT__STORAGE__STORAGE_PATH": str(place / "storage"),
                "QDRANT__STORAGE__SNAPSHOTS_PATH": str(place / "snapshots")}
    process = subprocess.Popen([program], cwd=place, env={**os.environ, **settings}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        yield _ready(f"http://127.0.0.1:{ports[0]}", process)
    finally:
        process.terminate()
        process.wait(30)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _ready(address: str, process: subprocess.Popen) -> str:
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        try:
            urllib.request.urlopen(f"{address}/readyz", timeout=1).close()
            return address
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{process.args} did not get ready at {address}")


def test_a_real_server_finds_what_exact_search_finds(url, tmp_path):
    rng = np.random.default_rng(0)
    vectors = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(3000, 16)).astype(np.float32)), dim=-1)
    live, queries = torch.arange(5, 3000), vectors[:50].numpy()
    collection = f"laserrec-test-{time.time_ns()}"
    place = {"url": url, "collection": collection}
    report = build_index(vectors, live, IndexKind.QDRANT, tmp_path / "index", queries, **place)
    assert report["items"] == 2995 and report["recall@10"] > 0.95
    index, exact = load_index(tmp_path / "index", shared=True), fill_index(vectors, live, IndexKind.EXACT)
    excluded = [np.arange(5, 500)] * len(queries)
    for options in ({"excluded": excluded}, {"allowed": np.arange(100, 130)}):
        (rows, scores), (truth, want) = (each.search(queries, 10, **options) for each in (index, exact))
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, truth, strict=True)]) > 0.95
        np.testing.assert_allclose(scores[:, 0], want[:, 0], atol=1e-4)
    with pytest.raises(UserError, match=f"collection '{collection}' at .* holds 2,995 items of something else"):
        fill_index(vectors, live[1:], IndexKind.QDRANT, **place)
    index._client.delete_collection(collection)
