"""The parts of a batch by Ray's workers: the local engine's own files, whoever begins and whoever ends."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace

import polars as pl
import pytest

from laserrec import __version__
from laserrec.batch import engine as batch
from laserrec.batch import ray_engine as batch_ray
from laserrec.batch.engine import BatchSettings, Job
from laserrec.batch.ray_engine import Cluster
from laserrec.recommender.indexing import build_index
from laserrec.recommender.recommender import LaserRecommender
from laserrec.retrieval.index import IndexKind
from laserrec.util.errors import UserError

N = 12
SETTINGS = BatchSettings(3, exclude_seen=True, chunk=4)
pytestmark = pytest.mark.filterwarnings("ignore::laserrec.data.losses.LossWarning")


def here(job, shard=(1, 1)):
    """By the local engine."""
    return batch.run(job, shard, progress=False)


def there(job, **cluster):
    """By Ray."""
    return batch_ray.run(job, Cluster(**cluster), progress=False)


@pytest.fixture
def job(folder, histories, tmp_path):
    return Job(folder, histories, tmp_path / "out", SETTINGS)


@pytest.fixture(scope="module")
def local(folder, histories, tmp_path_factory):
    """What the local engine makes of it: (folder, numbers)."""
    out = tmp_path_factory.mktemp("local") / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return out, here(Job(folder, histories, out, SETTINGS))


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


def test_it_ends_what_the_local_engine_began_with_the_same_files(cluster, job, local):
    want, numbers = local
    assert here(job, (1, 3))["parts_missing"] == 66
    before = {f: f.stat().st_mtime_ns for f in job.out.glob("part-*.parquet")}
    assert there(job, workers=2) == numbers
    assert numbers["no_known_item"] > 80 and numbers["users"] == 400 and files(job.out) == files(want)
    assert all(f.stat().st_mtime_ns == at for f, at in before.items())  # not done twice


def test_an_index_and_exclusions_in_the_workers(cluster, job, folder, tmp_path):
    build_index(LaserRecommender.from_pretrained(folder), IndexKind.EXACT, tmp_path / "index", queries=5)
    (tmp_path / "own.csv").write_text("user_id,item_id\n101,i4\n")
    job = replace(job, index=tmp_path / "index", exclude_file=tmp_path / "own.csv",
                  settings=replace(SETTINGS, exclude=("i3",)))
    numbers = there(job)
    assert here(replace(job, out=tmp_path / "mine")) == numbers
    got, want = (pl.concat([pl.read_parquet(f) for f in sorted(o.glob("part-*.parquet"))])
                 for o in (job.out, tmp_path / "mine"))
    assert got.drop("score").equals(want.drop("score")) and "i3" not in got["item_id"].to_list()
    assert here(job) == numbers  # the same manifest


def test_a_workers_user_error_is_the_local_engines(cluster, job, tmp_path):
    strict = replace(job, settings=BatchSettings(3, chunk=400, unknown="error"))
    with pytest.raises(UserError, match="user '100': 1 unknown item ids") as mine:
        here(replace(strict, out=tmp_path / "mine"))
    with pytest.raises(UserError) as theirs:
        there(strict)
    assert str(theirs.value) == str(mine.value)
    assert batch.parts_in(job.out) == 0


def test_ctrl_c_ends_it_and_the_local_engine_goes_on(cluster, job, local):
    over = threading.Event()

    def press():
        wait_for_parts(job.out, 2, lambda: not over.is_set())
        os.kill(os.getpid(), signal.SIGINT)

    hand = threading.Thread(target=press)
    hand.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            there(job, workers=1)
    finally:
        over.set()
        hand.join()
    assert 2 <= batch.parts_in(job.out) < 100
    here(job)
    assert files(job.out) == files(local[0])


def test_killed_and_resumed_from_the_command_line_without_a_word_of_ray(one_cpu, folder, histories, local, tmp_path):
    out, (want, _) = tmp_path / "out", local
    process = subprocess.Popen(command(folder, histories, out), stderr=subprocess.PIPE, text=True)
    wait_for_parts(out, 3, lambda: process.poll() is None)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[1]
    before = {f: f.stat().st_mtime_ns for f in out.glob("part-*.parquet")}
    assert 3 <= len(before) < 100 and not (out / "done.json").exists() and said == ""
    again = subprocess.run(command(folder, histories, out), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "ray" not in again.stderr.lower().replace("laserrec", "")
    assert again.stdout.startswith("400 users, ")
    assert all(f.stat().st_mtime_ns == at for f, at in before.items())
    assert {name: data for name, data in files(out).items() if ".tmp/" not in name} == files(want)


# -- without a Ray --------------------------------------------------------------------------------------------------


@pytest.fixture
def task(job, local):
    """What a worker is told of the local engine's finished folder."""
    job = replace(job, out=local[0])
    return batch_ray._Task(job, batch.plan(job).manifest, threads=1, done=0, mark=job.out)


def test_a_machine_that_sees_other_files_says_so(task, tmp_path):
    other = tmp_path / "other.parquet"
    pl.DataFrame({"user_id": [1], "items": [["i1"]]}).write_parquet(other)
    for changed, message in ((replace(task, version="0"), f"runs laserrec {__version__}, not 0"),
                             (replace(task, mark=tmp_path / "mark"), "doesn't see the output folder"),
                             (replace(task, job=replace(task.job, histories=other)), "has another file at"),
                             (replace(task, job=replace(task.job, exclude_file=other)), "has another file at")):
        with pytest.raises(UserError, match=message):
            batch_ray._opened(changed)


def test_a_machine_with_another_model_or_none_says_so(task, folder, tmp_path):
    other = LaserRecommender.from_pretrained(folder)
    other.remove_items(["i1"])
    other.save_pretrained(tmp_path / "other")
    for name, message in (("other", "has another model in"),
                          ("none", r"has no whole model in .*/none: .* is not a model folder.*machines share")):
        with pytest.raises(UserError, match=message):
            batch_ray._opened(replace(task, job=replace(task.job, model=tmp_path / name)))


def test_workers_that_die_in_vain_are_not_tried_for_ever(task):
    with pytest.raises(UserError, match="died before any part was done"):
        batch_ray._opened(replace(task, done=100), again=True)
    worker = batch_ray._opened(replace(task, done=99), again=True)  # others get on; so does this one
    assert len(worker.known) == N


class Nodes:
    """A Ray whose machines have so many CPUs, and GPUs all together."""

    def __init__(self, *cpus, gpus=0):
        self._nodes = [{"Alive": True, "Resources": {"CPU": float(c)}} for c in cpus] + [
            {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}, {"Alive": True, "Resources": {}}]
        self._nodes[0]["Resources"]["GPU"] = float(gpus)

    def nodes(self):
        return self._nodes


@pytest.mark.parametrize(("cpus", "workers", "parts", "want"), [
    ((8,), None, 100, (8, 1)), ((8,), 3, 100, (2, 3)), ((8, 8, 4), None, 100, (4, 3)), ((8, 8), 4, 100, (4, 4)),
    ((8, 2), 2, 100, (4, 2)), ((8,), 8, 2, (4, 2)), ((1, 1), 2, 100, (1, 2))])
def test_workers_share_the_cpus(cpus, workers, parts, want):
    share = batch_ray._share(Nodes(*cpus), Cluster(workers=workers), "auto", parts)
    assert (share.cpus, share.workers, share.gpus) == (*want, 0)


@pytest.mark.parametrize(("gpus", "workers", "num_gpus", "device", "want"), [
    (2, None, None, "auto", (2, 1)), (2, None, None, "cuda", (2, 1)), (2, None, None, "cpu", (1, 0)),
    (2, 3, None, "auto", (3, 0)), (1, 2, 0.5, "auto", (2, 0.5)), (1, None, 0.25, "cuda", (4, 0.25)),
    (2, None, 0, "auto", (1, 0))])
def test_workers_get_gpus(gpus, workers, num_gpus, device, want):
    share = batch_ray._share(Nodes(8, gpus=gpus), Cluster(workers=workers, num_gpus=num_gpus), device, 100)
    assert (share.workers, share.gpus) == want


def test_more_workers_than_there_is_room_for():
    for cluster, device, message in ((Cluster(workers=3), "auto", "3 workers need as many CPUs and Ray has 2"),
                                     (Cluster(workers=2), "cuda", "2 workers of 1 GPUs need 2 and Ray has 1"),
                                     (Cluster(num_gpus=2), "auto", "1 workers of 2 GPUs need 2 and Ray has 1")):
        with pytest.raises(UserError, match=message):
            batch_ray._share(Nodes(2, gpus=1), cluster, device, 100)
    with pytest.raises(UserError, match="no machine with a CPU"):
        batch_ray._share(Nodes(0), Cluster(), "auto", 100)


def test_ray_chooses_the_gpu(job):
    with pytest.raises(UserError, match="Ray chooses each worker's GPU, give cuda"):
        there(replace(job, device="cuda:1"))


@pytest.mark.parametrize(("address", "message"), [
    ("here", "give auto or host:port"), ("ray://127.0.0.1:10001", "give auto or host:port"),
    ("127.0.0.1:1", "nothing answers at 127.0.0.1:1: .*; start one with"), ("127.0.0.1:99999999", "nothing answers")])
def test_an_address_without_a_ray(address, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        batch_ray._check_address(address, "start one with")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=message):
        batch_ray._check_address("auto", "start one with")


def test_no_ray_library_names_its_extra(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"laserrec\[ray\]"):
        there(job)
