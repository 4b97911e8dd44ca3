"""The parts of a batch by Ray's workers: the local engine's own files, whoever begins and whoever ends."""

import os
import signal
import subprocess
import sys
import threading
import time

import polars as pl
import pytest
import tiny

from laserrec import LaserRecommender, __version__
from laserrec.batch import engine as batch
from laserrec.batch import ray_engine as batch_ray
from laserrec.batch.engine import BatchSettings
from laserrec.batch.ray_engine import Cluster
from laserrec.retrieval.build import build_index
from laserrec.retrieval.index import IndexKind
from laserrec.util.errors import UserError

N = 12
SETTINGS = BatchSettings(3, exclude_seen=True, chunk=4)


@pytest.fixture(scope="module")
def folder(llm, llm_folder, tmp_path_factory):
    config = tiny.config(llm_folder(), prompt={"layout": "text_first", "max_items": 4, "max_item_tokens": 8},
                         head={"seen_offset": True}, train={"stage_one_epochs": 0, "stage_two_epochs": 0})
    out = tmp_path_factory.mktemp("batch_ray") / "model"
    LaserRecommender.fit_dataset(tiny.planted(N, users=16), tiny.id_model(N), config, out, False, llm())
    return out


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    """400 users in 100 parts; some have no history, some no known item."""
    rows = [[f"i{(u * 5 + p) % N + 1}" for p in range(u % 5)] if u % 7 else ["nope"] for u in range(400)]
    path = tmp_path_factory.mktemp("histories") / "h.parquet"
    pl.DataFrame({"user_id": range(100, 500), "items": rows}).write_parquet(path)
    return path


@pytest.fixture(scope="module")
def local(folder, histories, llm, tmp_path_factory):
    """What the local engine makes of it: (folder, numbers)."""
    out = tmp_path_factory.mktemp("local") / "out"
    return out, batch.run(LaserRecommender.from_pretrained(folder, llm()), folder, histories, out, SETTINGS,
                          progress=False)


@pytest.fixture(scope="module")
def one_cpu():
    """One thread, as the local engine has it in tests, in all processes that are started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def cluster(one_cpu):
    """One small Ray for all tests of this file that run in this process."""
    with batch_ray._connected(Cluster(workers=2)) as ray:
        yield ray


def files(out):
    """Name -> bytes of all that a finished run leaves."""
    return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}


def command(folder, histories, out):
    return [sys.executable, "-m", "laserrec", "batch", str(folder), str(histories), str(out), "--k", "3",
            "--exclude-seen", "--chunk", "4", "--quiet", "--engine", "ray", "--workers", "1"]


def wait_for_parts(out, count, going=lambda: True):
    until = time.monotonic() + 240
    while batch.parts_in(out) < count and going() and time.monotonic() < until:
        time.sleep(0.005)


def test_it_ends_what_the_local_engine_began_with_the_same_files(cluster, folder, histories, local, llm, tmp_path):
    out, (want, numbers) = tmp_path / "out", local
    model = LaserRecommender.from_pretrained(folder, llm())
    first = batch.run(model, folder, histories, out, SETTINGS, (1, 3), progress=False)
    assert first["parts_missing"] == 66
    before = {f: f.stat().st_mtime_ns for f in out.glob("part-*.parquet")}
    assert batch_ray.run(folder, histories, out, SETTINGS, Cluster(workers=2), progress=False) == numbers
    assert numbers["skipped"] > 80 and files(out) == files(want)
    assert all(f.stat().st_mtime_ns == at for f, at in before.items())  # not done twice


def test_an_index_in_the_workers(cluster, folder, histories, local, llm, tmp_path):
    out, model = tmp_path / "out", LaserRecommender.from_pretrained(folder, llm())
    build_index(model, IndexKind.USEARCH, tmp_path / "index", queries=5)
    batch_ray.run(folder, histories, out, SETTINGS, Cluster(), progress=False, index=tmp_path / "index")
    got, want = (pl.concat([pl.read_parquet(f) for f in sorted(o.glob("part-*.parquet"))]) for o in (out, local[0]))
    assert got.drop("score").equals(want.drop("score"))
    model.use_index(tmp_path / "index")
    assert batch.run(model, folder, histories, out, SETTINGS, progress=False)["parts_missing"] == 0  # the same manifest


def test_a_workers_user_error_is_the_local_engines(cluster, folder, histories, llm, tmp_path):
    strict = BatchSettings(3, chunk=400, unknown="error")
    model = LaserRecommender.from_pretrained(folder, llm())
    with pytest.raises(UserError, match="user 100 holds unknown items") as mine:
        batch.run(model, folder, histories, tmp_path / "mine", strict, progress=False)
    with pytest.raises(UserError) as theirs:
        batch_ray.run(folder, histories, tmp_path / "theirs", strict, Cluster(), progress=False)
    assert str(theirs.value) == str(mine.value)
    assert batch.parts_in(tmp_path / "theirs") == 0


def test_ctrl_c_ends_it_and_the_local_engine_goes_on(cluster, folder, histories, local, llm, tmp_path):
    out, (want, _) = tmp_path / "out", local
    over = threading.Event()

    def press():
        wait_for_parts(out, 2, lambda: not over.is_set())
        os.kill(os.getpid(), signal.SIGINT)

    hand = threading.Thread(target=press)
    hand.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            batch_ray.run(folder, histories, out, SETTINGS, Cluster(workers=1), progress=False)
    finally:
        over.set()
        hand.join()
    assert 2 <= batch.parts_in(out) < 100
    batch.run(LaserRecommender.from_pretrained(folder, llm()), folder, histories, out, SETTINGS, progress=False)
    whole = {name: data for name, data in files(out).items() if not name.endswith(".tmp")}
    assert whole == files(want)


def test_killed_and_resumed_from_the_command_line_without_a_word_of_ray(one_cpu, folder, histories, local, tmp_path):
    out, (want, numbers) = tmp_path / "out", local
    process = subprocess.Popen(command(folder, histories, out), stderr=subprocess.PIPE, text=True)
    wait_for_parts(out, 3, lambda: process.poll() is None)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[1]
    before = {f: f.stat().st_mtime_ns for f in out.glob("part-*.parquet")}
    assert 3 <= len(before) < 100 and not (out / "done.json").exists() and said == ""
    again = subprocess.run(command(folder, histories, out), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stderr == ""
    assert again.stdout.startswith(f"400 users, {numbers['skipped']} skipped, 100 parts in ")
    assert all(f.stat().st_mtime_ns == at for f, at in before.items())
    assert {name: data for name, data in files(out).items() if not name.endswith(".tmp")} == files(want)


# -- without a Ray --------------------------------------------------------------------------------------------------


@pytest.fixture
def job(folder, histories, local):
    """What a worker is told of the local engine's finished folder."""
    out, _ = local
    work = batch.plan(folder, histories, out, SETTINGS)
    return batch_ray._Job(folder, histories, out, None, SETTINGS, work.manifest, threads=1, done=0)


def changed(job, **facts):
    return batch_ray._Job(**{**vars(job), **facts})


def test_a_machine_that_sees_other_files_says_so(job, tmp_path):
    other = tmp_path / "other.parquet"
    pl.DataFrame({"user_id": [1], "items": [["i1"]]}).write_parquet(other)
    for facts, message in (({"version": "0"}, f"runs laserrec {__version__}, not 0"),
                           ({"out": tmp_path}, "doesn't see the output folder"),
                           ({"histories": other}, "has another file at"),
                           ({"manifest": {**job.manifest, "k": 99}}, "doesn't see the output folder")):
        with pytest.raises(UserError, match=message):
            batch_ray._opened(changed(job, **facts))


def test_a_machine_with_another_model_or_none_says_so(job, folder, tmp_path, llm):
    other = LaserRecommender.from_pretrained(folder, llm())
    other.remove_items(["i1"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has another model in"):
        batch_ray._opened(changed(job, model=tmp_path / "other"))
    with pytest.raises(UserError, match=r"has no whole model in .*/none: .* is not a model folder.*machines share"):
        batch_ray._opened(changed(job, model=tmp_path / "none"))


def test_workers_that_die_in_vain_are_not_tried_for_ever(job):
    with pytest.raises(UserError, match="died before any part was done"):
        batch_ray._opened(changed(job, done=100), again=True)
    model, _ = batch_ray._opened(changed(job, done=99), again=True)  # others get on; so does this one
    assert len(model.embeddings) == N


class Nodes:
    """A Ray whose machines have so many CPUs."""

    def __init__(self, *cpus):
        self._nodes = [{"Alive": True, "Resources": {"CPU": float(c)}} for c in cpus] + [
            {"Alive": False, "Resources": {"CPU": 64.0}}, {"Alive": True, "Resources": {}}]

    def nodes(self):
        return self._nodes


@pytest.mark.parametrize(("cpus", "workers", "parts", "want"), [
    ((8,), None, 100, (8, 1)), ((8,), 3, 100, (2, 3)), ((8, 8, 4), None, 100, (4, 3)), ((8, 8), 4, 100, (4, 4)),
    ((8, 2), 2, 100, (4, 2)), ((8,), 8, 2, (4, 2)), ((1, 1), 2, 100, (1, 2))])
def test_workers_share_the_cpus(cpus, workers, parts, want):
    assert batch_ray._share(Nodes(*cpus), workers, parts) == want


def test_more_workers_than_cpus_or_no_cpu_at_all():
    with pytest.raises(UserError, match="3 workers need as many CPUs and Ray has 2"):
        batch_ray._share(Nodes(2), 3, 100)
    with pytest.raises(UserError, match="no machine with a CPU"):
        batch_ray._share(Nodes(), None, 100)


@pytest.mark.parametrize(("address", "message"), [
    ("here", "give auto or host:port"), ("ray://127.0.0.1:10001", "give auto or host:port"),
    ("127.0.0.1:1", "nothing answers at 127.0.0.1:1: .*; start one with"), ("127.0.0.1:99999999", "nothing answers")])
def test_an_address_without_a_ray(address, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        batch_ray._check_address(address, "start one with")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=message):
        batch_ray._check_address("auto", "start one with")


def test_no_ray_library_names_its_extra(folder, histories, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"laserrec\[ray\]"):
        batch_ray.run(folder, histories, tmp_path / "out", SETTINGS, Cluster(), progress=False)
