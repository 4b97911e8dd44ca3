"""`laserrec batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cyclopts import App

from laserrec.cli.options import (
    OPENING,
    READING,
    Index,
    JsonFile,
    Model,
    Opening,
    Quiet,
    Reading,
    Switch,
    finish,
    item_ids,
    say,
)
from laserrec.util.errors import UserError

batch_app = App(name="batch")


@batch_app.default
def batch(model: Model, histories: Path, out: Path, *, k: int = 10, exclude_seen: Switch = False,
          exclude: str | None = None, exclude_file: Path | None = None, chunk: int = 4096,
          unknown: Literal["drop", "error"] = "drop", shard: str = "1/1", engine: Literal["local", "ray"] = "local",
          workers: int | None = None, num_gpus: float | None = None, address: str | None = None, index: Index = None,
          reading: Reading = READING, opening: Opening = OPENING, quiet: Quiet = False,
          json_file: JsonFile = None) -> None:
    """Recommend for every user of a file, in bounded memory. Run again to resume.

    Examples:
      laserrec batch runs/quickstart/model histories.parquet recommendations --k 20
      laserrec batch /mnt/model /mnt/histories.parquet /mnt/recommendations --engine ray --address auto --workers 8

    --engine ray does the same parts with several workers, on this machine or on the cluster at --address. All of its
    machines must see MODEL, HISTORIES, OUT and the index under the same paths, on a file system that they share.
    Engines and shards may be mixed: each goes on with the parts that are missing when it starts.

    Parameters
    ----------
    histories
        A file, a folder of parts or a pattern, Parquet (read part by part), CSV or JSON lines: user_id and a list of
        item ids, or user_id and item_id with a user's rows together, ordered by timestamp if there is one.
    out
        Folder of part-*.parquet: user_id, item_id, score, rank. A user who can't be answered has one row of nulls.
    k
        Items per user.
    exclude_seen
        Never recommend what stands in the history.
    exclude
        Item ids that nobody is recommended, separated by commas.
    exclude_file
        A table of items not to be recommended: user_id and item_id, or item_id alone for all users.
    chunk
        Users per part.
    unknown
        Unknown items: drop leaves them out of a history, error stops.
    shard
        I/N does the I-th of N shares, so that N processes or machines fill one folder.
    engine
        local works in this process, ray on Ray Data (pip install 'laserrec[ray]').
    workers
        Ray workers; each loads the model, and they share the CPUs. Default: one a GPU, without GPUs one a machine.
    num_gpus
        GPUs of each Ray worker; .5 lets two share one. Default: 1 with --device cuda, and with auto where Ray has them.
    address
        A running Ray cluster that this machine is part of: auto or host:port. Default: one is started here for
        the run.
    """
    from laserrec.batch import engine as work
    from laserrec.recommender.hub import local_folder

    if engine == "local" and (workers, num_gpus, address) != (None, None, None):
        raise UserError("--workers, --num-gpus and --address are for --engine ray")
    if (workers is not None and workers < 1) or (num_gpus is not None and num_gpus < 0):
        raise UserError(f"workers is {workers} and num_gpus is {num_gpus}; give at least 1 worker and 0 GPUs")
    share, excluded = _shard(shard), () if exclude is None else tuple(item_ids(exclude))
    settings = work.BatchSettings(k, exclude_seen, chunk, unknown, excluded)
    files = reading.options()
    _ = work.Source(histories, files).n_users  # mistakes are told before a model is fetched or Ray is started
    job = work.Job(local_folder(model), histories, out, settings, index, exclude_file, **vars(opening),
                   reading=files)
    if engine == "ray":
        from laserrec.batch import ray_engine

        result = ray_engine.run(job, ray_engine.Cluster(address, workers, num_gpus), share, not quiet)
    else:
        result = work.run(job, share, not quiet)
    said = [f"{result['users']:,} users", f"{result['answered']:,} answered",
            f"{result['no_known_item']:,} without a known item", f"{result['nothing_left']:,} with nothing left",
            f"{result['unknown_items']:,} of {result['items']:,} items unknown", f"{result['parts']} parts in {out}"]
    if result["parts_missing"]:
        said.append(f"{result['parts_missing']} parts are left to other shards")
    say(", ".join(said))
    finish(result, json_file)


def _shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise UserError(f"shard is {text!r}; give I/N with I from 1 to N")
    return int(first), int(count)
