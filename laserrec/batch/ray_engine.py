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
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from laserrec import __version__
from laserrec.batch.engine import Job, Plan, Worker, complete, exclusion_digest, parts_in
from laserrec.batch.source import Part, Source, digest_of_ends
from laserrec.recommender.folder import model_identity
from laserrec.util.errors import UserError
from laserrec.util.io import temporary

_OBJECT_STORE_BYTES = 128 * 2**20
"""Of a Ray that is started here: row numbers and messages are all that it holds."""
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Cluster:
    """Where the workers are."""

    address: str | None = None
    """Of a running Ray that this machine is part of ("auto", "host:6379"); None starts one here, for the run."""
    workers: int | None = None
    """Processes that each load the model and share the CPUs; None: one a GPU that they use, else one a machine."""
    num_gpus: float | None = None
    """GPUs of each worker, a fraction where several share one; None: 1 where the job's device is a GPU, or is auto and
    Ray has enough GPUs."""


@dataclass(frozen=True)
class _Task:
    """What each worker is told. Paths are absolute: a worker has its own working directory."""

    job: Job
    manifest: dict[str, Any]
    threads: int
    done: int
    """Parts in the folder when the run began."""
    mark: Path
    """A folder in the output folder that is there while the run goes on."""
    version: str = __version__


@dataclass(frozen=True)
class _Share:
    """What each worker gets."""

    workers: int
    cpus: int
    gpus: float


def run(job: Job, cluster: Cluster, shard: tuple[int, int] = (1, 1), progress: bool = True) -> dict[str, Any]:
    """As `laserrec.batch.engine.run`, by the workers of a Ray cluster, with the same files as its result; each engine
    goes on where the other was stopped. An initialised Ray is used as it is. Raises UserError also for a Ray that
    can't be reached, a machine that doesn't share the files, and workers that die."""
    paths = {name: path.absolute() for name, path in vars(job).items() if isinstance(path, Path)}
    job = replace(job, **paths)
    if job.device.startswith("cuda:"):
        raise UserError(f"device is {job.device}; Ray chooses each worker's GPU, give cuda")

    @contextlib.contextmanager
    def there(work: Plan) -> Iterator[Iterator[None]]:
        with (_silent_core(), _connected(cluster) as ray, _told(ray),
              contextlib.closing(_results(ray, job, work, cluster)) as results):
            yield results

    return complete(job, shard, progress, there)


def _results(ray: Any, job: Job, work: Plan, cluster: Cluster) -> Generator[None, None, None]:
    """One step per part, as the parts get done. A block a part, or a worker would keep the news of many parts to
    itself."""
    share = _share(ray, cluster, job.device, len(work.todo))
    if job.device == "auto" and not share.gpus:
        job = replace(job, device="cpu")  # or all would take the same GPU, unknown to Ray
    job.out.mkdir(parents=True, exist_ok=True)
    with temporary(job.out / "run") as mark:
        task = _Task(job, work.manifest, share.cpus, parts_in(job.out), mark)
        parts = ray.data.from_items([asdict(part) for part in work.todo], override_num_blocks=len(work.todo))
        done = parts.map(_Writer, fn_constructor_args=(task,), num_cpus=share.cpus, num_gpus=share.gpus or None,
                         compute=ray.data.ActorPoolStrategy(size=share.workers))
        for row in done.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield


class _Writer:
    """A worker's share of the job. The model is loaded with the first part, not in the constructor, whose errors Ray
    would answer with another try."""

    def __init__(self, task: _Task):
        import ray

        self._task, self._again = task, ray.get_runtime_context().was_current_actor_reconstructed
        self._open: Worker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            self._open = self._open or _opened(self._task, self._again)
            self._open.write(Part(**{name: int(value) for name, value in row.items()}))
        except UserError as error:
            return {"error": str(error)}
        return {"error": ""}


def _opened(task: _Task, again: bool = False) -> Worker:
    """again: this worker stands in for a dead one. Raises UserError where this machine sees other files than the one
    that gives the work, or runs another version."""
    import torch

    job, manifest = task.job, task.manifest
    # Ray replaces dead workers for ever. Where a model is too large for the memory, that gets nowhere and never ends.
    if again and parts_in(job.out) <= task.done:
        raise UserError("a worker died before any part was done, probably for want of memory: each loads the whole "
                        "model; give fewer workers")
    host, advice = socket.gethostname(), "the ray engine needs a file system that all machines share"
    if task.version != __version__:
        raise UserError(f"{host} runs laserrec {__version__}, not {task.version}; install one version everywhere")
    if not task.mark.is_dir():
        raise UserError(f"{host} doesn't see the output folder {job.out}; {advice}")
    source = Source(job.histories, job.reading)
    found = {**digest_of_ends(source.files), "users": manifest["input"]["users"]}
    if found != manifest["input"] or exclusion_digest(job) != manifest["exclude"]:
        raise UserError(f"{host} has another file at {job.histories} or {job.exclude_file}; {advice}")
    try:
        model = model_identity(job.model)
    except UserError as error:
        raise UserError(f"{host} has no whole model in {job.model}: {error}; {advice}") from None
    if model != manifest["model"]:
        raise UserError(f"{host} has another model in {job.model}; {advice}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or task.threads))
    return Worker(job, source, manifest)


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
        raise UserError("the ray engine needs another library: pip install 'laserrec[ray]'") from None
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
        advice = "start one with ray start --head, or give no address"
        _check_address(cluster.address, advice)
        try:
            ray.init(address=cluster.address, **said)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"no Ray can be joined at {cluster.address}: {first}; {advice}") from None
        return
    # Workers import the package from where this process has it, an uninstalled checkout too.
    home, before = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
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


def _share(ray: Any, cluster: Cluster, device: str, parts: int) -> _Share:
    """As many CPUs as all workers of the smallest machine can have alike. Raises UserError for more workers than CPUs
    or GPUs."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    machines, gpus = [int(r["CPU"]) for r in alive], sum(r.get("GPU", 0) for r in alive)
    if not machines:
        raise UserError("Ray has no machine with a CPU to work on; start one with ray start --num-cpus 4")
    each = cluster.num_gpus
    if each is None:
        each = float(device == "cuda" or (device == "auto" and gpus >= (cluster.workers or 1)))
    count = min(cluster.workers or (max(1, int(gpus / each)) if each else len(machines)), parts)
    if count > sum(machines):
        raise UserError(f"{count} workers need as many CPUs and Ray has {sum(machines)}; give fewer workers")
    if count * each > gpus:
        raise UserError(f"{count} workers of {each:g} GPUs need {count * each:g} and Ray has {gpus:g}; give fewer "
                        "workers, a smaller num_gpus, or the device cpu")
    cpus = max(c for c in range(1, max(machines) + 1) if sum(m // c for m in machines) >= count)
    return _Share(count, cpus, each)


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
