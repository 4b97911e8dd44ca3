"""`laserrec batch`. Thin, as cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console

from laserrec.util.errors import UserError
from laserrec.util.io import write_json

batch_app = App(name="batch")
out_console = Console()


@batch_app.default
def batch(model: Path, histories: Path, out: Path, *, k: int = 10, exclude_seen: bool = False, chunk: int = 4096,
          unknown: Literal["skip", "error"] = "skip", shard: str = "1/1", engine: Literal["local", "ray"] = "local",
          workers: int | None = None, address: str | None = None, index: Path | None = None, quiet: bool = False,
          json_file: Annotated[Path | None, Parameter(name="--json")] = None) -> None:
    """Recommend for every user of a Parquet file, in bounded memory. Run again to resume.

    Examples:
      laserrec batch runs/quickstart/model histories.parquet recommendations --k 20
      laserrec batch /mnt/model /mnt/histories.parquet /mnt/recommendations --engine ray --address auto --workers 8

    --engine ray does the same parts with several workers, on this machine or on the cluster at --address. All of its
    machines must see MODEL, HISTORIES, OUT and the index under the same paths, on a file system that they share.
    Engines and shards may be mixed: each goes on with the parts that are missing when it starts.

    Parameters
    ----------
    model
        A model folder, or ORG/NAME[@REVISION] on the Hugging Face Hub.
    histories
        Parquet: user_id and items (a list), or user_id and item_id with a user's rows together, oldest first.
    out
        Folder of part-*.parquet: user_id, item_id, score, rank.
    k
        Items per user.
    exclude_seen
        Never recommend what stands in the history.
    chunk
        Users per part.
    unknown
        Unknown items: skip leaves them out of a history, error stops.
    shard
        I/N does the I-th of N shares, so that N processes or machines fill one folder.
    engine
        local works in this process, ray on Ray Data (pip install 'laserrec[ray]').
    workers
        Ray workers; each loads the model, and they share the CPUs. Default: one a machine.
    address
        A running Ray cluster that this machine is part of: auto or host:port. Default: one is started here for
        the run.
    index
        Folder that laserrec index build made of MODEL; else users are compared with all items.
    quiet
        No progress.
    json_file
        Write the numbers to this file.
    """
    from laserrec.batch import engine as work
    from laserrec.recommender.hub import local_folder

    if k < 1 or chunk < 1:
        raise UserError(f"k is {k} and chunk is {chunk}; both must be at least 1")
    if engine == "local" and (workers, address) != (None, None):
        raise UserError("--workers and --address are for --engine ray")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}; give at least 1")
    settings, share = work.BatchSettings(k, exclude_seen, chunk, unknown), _shard(shard)
    _ = work.HistoryFile(histories).n_users  # mistakes are told before a model is loaded or Ray is started
    folder = local_folder(model)
    if engine == "ray":
        from laserrec.batch import ray_engine as batch_ray

        cluster = batch_ray.Cluster(address, workers)
        result = batch_ray.run(folder, histories, out, settings, cluster, share, not quiet, index)
    else:
        from laserrec.recommender.recommender import LaserRecommender

        loaded = LaserRecommender.from_pretrained(folder)
        loaded.use_index(index)
        result = work.run(loaded, folder, histories, out, settings, share, not quiet)
    left = f", {result['parts_missing']} parts are left to other shards" if result["parts_missing"] else ""
    done = f"{result['users']:,} users, {result['skipped']:,} skipped, {result['parts']} parts in {out}"
    out_console.print(done + left, highlight=False)
    if json_file is not None:
        write_json(json_file, result)


def _shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise UserError(f"shard is {text!r}; give I/N with I from 1 to N")
    return int(first), int(count)
