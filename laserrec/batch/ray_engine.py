"""`laserrec batch --engine ray`: the parts of `laserrec.batch.engine` on Ray Data, on this machine or on a cluster.

Through Ray go row numbers one way and messages the other. Each worker loads the model once, reads its parts' rows of
the input and writes its parts itself, so that nothing large passes the object store; in return the input, the model and
the output must lie on a file system that all machines share, and each worker looks whether they do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laserrec import __version__
from laserrec.batch.engine import (
    BatchSettings,
    HistoryFile,
    Part,
    Plan,
    bar_of,
    differing,
    parts_in,
    plan,
    summary,
    write_part,
)
from laserrec.recommender.folder import model_identity
from laserrec.recommender.recommender import LaserRecommender
from laserrec.retrieval.index import index_kind
from laserrec.util.errors import UserError
from laserrec.util.interrupt import DeferredInterrupt
from laserrec.util.io import read_json

_OBJECT_STORE_BYTES = 128 * 2**20
"""Of a Ray that is started here: row numbers and messages are all that it holds."""
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Cluster:
    """Where the workers are."""

    address: str | None = None
    """Of a running Ray that this machine is part of ("auto", "host:6379"); None starts one here, for the run."""
    workers: int | None = None
    """Processes that each load the model and share the CPUs; None: one a machine."""


@dataclass(frozen=True)
class _Job:
    """What each worker is told. Paths are absolute: a worker has its own working directory."""

    model: Path
    histories: Path
    out: Path
    index: Path | None
    settings: BatchSettings
    manifest: dict[str, Any]
    threads: int
    done: int
    """Parts in the folder when the run began."""
    version: str = __version__


def run(model_folder: Path, histories: Path, out: Path, settings: BatchSettings, cluster: Cluster,
        shard: tuple[int, int] = (1, 1), progress: bool = True, index: Path | None = None) -> dict[str, Any]:
    """As `laserrec.batch.engine.run`, by the workers of a Ray cluster, with the same files as its result; each engine
    goes on where the other was stopped. An initialised Ray is used as it is. Raises UserError also for a Ray that
    can't be reached, a machine that doesn't share the files, and workers that die."""
    model_folder, histories, out = (path.absolute() for path in (model_folder, histories, out))
    index = None if index is None else index.absolute()
    work = plan(model_folder, histories, out, settings, shard, None if index is None else index_kind(index))
    if work.todo:
        with _silent_core(), _connected(cluster) as ray, _told(ray):
            cpus, workers = _share(ray, cluster.workers, len(work.todo))
            job = _Job(model_folder, histories, out, index, settings, work.manifest, cpus, parts_in(out))
            with (DeferredInterrupt() as interrupt, bar_of(work, settings.chunk, progress) as bar,
                  contextlib.closing(_results(ray, work, job, workers, cpus)) as results):
                for error in results:
                    if error:
                        raise UserError(error)
                    bar.advance(settings.chunk)
                    interrupt.check()
    return summary(out, work)


def _results(ray: Any, work: Plan, job: _Job, workers: int, cpus: int) -> Iterator[str]:
    """A message per part, as the parts get done; empty where all went well. A block a part, or a worker would keep the
    news of many parts to itself."""
    parts = ray.data.from_items([asdict(part) for part in work.todo], override_num_blocks=len(work.todo))
    done = parts.map(_Writer, fn_constructor_args=(job,), num_cpus=cpus,
                     compute=ray.data.ActorPoolStrategy(size=workers))
    for row in done.iter_rows():
        yield row["error"]


class _Writer:
    """A worker's share of the job. The model is loaded with the first part, not in the constructor, whose errors Ray
    would answer with another try."""

    def __init__(self, job: _Job):
        import ray

        self._job, self._again = job, ray.get_runtime_context().was_current_actor_reconstructed
        self._open: tuple[LaserRecommender, HistoryFile] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            self._open = self._open or _opened(self._job, self._again)
            part = Part(**{name: int(value) for name, value in row.items()})
            write_part(*self._open, self._job.out, part, self._job.settings)
        except UserError as error:
            return {"error": str(error)}
        return {"error": ""}


def _opened(job: _Job, again: bool = False) -> tuple[LaserRecommender, HistoryFile]:
    """again: this worker stands in for a dead one. Raises UserError where this machine sees other files than the one
    that gives the work, or runs another version."""
    import torch

    # Ray replaces dead workers for ever. Where a model is too large for the memory, that gets nowhere and never ends.
    if again and parts_in(job.out) <= job.done:
        raise UserError("a worker died before any part was done, probably for want of memory: each loads the whole "
                        "model; give fewer --workers")
    host, advice = socket.gethostname(), "--engine ray needs a file system that all machines share"
    if job.version != __version__:
        raise UserError(f"{host} runs laserrec {__version__}, not {job.version}; install one version everywhere")
    manifest = job.out / "manifest.json"
    if not manifest.is_file() or differing(job.manifest, read_json(manifest, "name another folder")):
        raise UserError(f"{host} doesn't see the output folder {job.out}; {advice}")
    source = HistoryFile(job.histories)
    if {**source.ends(), "users": job.manifest["input"]["users"]} != job.manifest["input"]:
        raise UserError(f"{host} has another file at {job.histories}; {advice}")
    try:
        model = model_identity(job.model)
    except UserError as error:
        raise UserError(f"{host} has no whole model in {job.model}: {error}; {advice}") from None
    if model != job.manifest["model"]:
        raise UserError(f"{host} has another model in {job.model}; {advice}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or job.threads))
    loaded = LaserRecommender.from_pretrained(job.model)
    loaded.use_index(job.index)
    return loaded, source


# -- Ray itself -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _silent_core() -> Iterator[None]:
    """Ray's core writes news of its own affairs straight to file descriptor 2; what ends a run is raised besides.
    Python's stderr goes on where it went."""
    sys.stderr.flush()
    kept, before = os.dup(2), sys.stderr
    with contextlib.suppress(OSError, AttributeError, ValueError):  # a stderr that is no file stays as it is
        if before.fileno() == 2:
            sys.stderr = os.fdopen(kept, "w", buffering=1, encoding=before.encoding, errors="backslashreplace",
                                   closefd=False)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = before
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, initialised; ended again if it was started here. Silent, and without usage statistics."""
    # Before the import, which reads some of them.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
                   "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("--engine ray needs another library: pip install 'laserrec[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    try:
        _start(ray, cluster)
        yield ray
    finally:
        ray.shutdown()


def _start(ray: Any, cluster: Cluster) -> None:
    said: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if cluster.address is not None:
        advice = "start one with ray start --head, or leave --address out"
        _check_address(cluster.address, advice)
        try:
            ray.init(address=cluster.address, **said)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"no Ray can be joined at {cluster.address}: {first}; {advice}") from None
        return
    # Workers import the package from where this process has it, an uninstalled checkout too.
    home, before = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = home if not before else home + os.pathsep + before
    try:
        ray.init(address="local", num_cpus=max(os.cpu_count() or 1, cluster.workers or 1), include_dashboard=False,
                 object_store_memory=_OBJECT_STORE_BYTES, **said)
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _check_address(address: str, advice: str) -> None:
    """Ray itself goes on trying for many minutes."""
    found = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = found.rpartition(":")
    if not found:  # Ray knows of one that was started on this machine, or says that there is none
        return
    if not host or not port.isdigit() or "/" in host:
        raise UserError(f"address is {found!r}; give auto or host:port of a Ray cluster that this machine is part of")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"nothing answers at {found}: {error}; {advice}") from None


def _share(ray: Any, workers: int | None, parts: int) -> tuple[int, int]:
    """(CPUs of a worker, workers): as many CPUs as all workers of the smallest machine can have alike."""
    machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    machines = [int(cpus) for cpus in machines if cpus >= 1]
    if not machines:
        raise UserError("Ray has no machine with a CPU to work on; start one with ray start --num-cpus 4")
    count = min(workers or len(machines), parts)
    if count > sum(machines):
        raise UserError(f"{count} workers need as many CPUs and Ray has {sum(machines)}; give fewer --workers")
    cpus = max(c for c in range(1, max(machines) + 1) if sum(m // c for m in machines) >= count)
    return cpus, count


@contextlib.contextmanager
def _told(ray: Any) -> Iterator[None]:
    """What Ray finds out about its workers, as a message. Errors in our own code pass as they are."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError) as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"Ray lost a worker: {first}; run the same command again to go on") from None
    except ray.exceptions.RayTaskError as error:
        if "No module named 'laserrec'" in str(error):
            raise UserError("Ray's workers have no laserrec; install it on all machines of the cluster") from None
        raise
