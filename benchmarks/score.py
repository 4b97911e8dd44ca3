"""The softmax over all items and the ranking of all items, ours beside plain torch, in time and memory.

    python benchmarks/score.py --sizes 10000 100000 1000000 --json score.json
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from cyclopts import Parameter, run
from machine import peak_memory, side_by_side
from rich.console import Console
from rich.table import Table
from torch import Tensor

from laserrec.data.dataset import Cases
from laserrec.data.histories import Histories
from laserrec.evaluation.evaluate import rank_cases
from laserrec.experiments.machine import describe
from laserrec.methods.laser.losses import item_contrast
from laserrec.util.io import write_json
from laserrec.util.memory import rows_at_once
from laserrec.util.progress import Progress

_TEMPERATURE = 0.05
_TOLERANCE = 1e-4


def _inputs(n_items: int, width: int, users: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(n_items, width, generator=generator)
    return (torch.randn(users, width, generator=generator), items,
            torch.randint(0, n_items, (users,), generator=generator))


def _softmax(ours: bool, users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    users = users.clone().requires_grad_()
    if ours:
        loss = item_contrast(users, items, targets, _TEMPERATURE)
    else:
        logits = F.normalize(users, dim=-1) @ F.normalize(items, dim=-1).T / _TEMPERATURE
        loss = F.cross_entropy(logits, targets)
    loss.backward()
    return users.grad


def _ranking(ours: bool, users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    if ours:
        each = Histories(torch.zeros(len(users), dtype=torch.long), torch.arange(1, len(users) + 1))
        ranks = rank_cases(_Products(users, items), Cases(np.arange(len(users)), each, targets), len(users), len(items))
        return torch.as_tensor(ranks.plain)
    scores = users @ items.T
    own = scores.gather(1, targets[:, None])
    return (scores > own).sum(dim=1) + 1.0 + ((scores == own).sum(dim=1) - 1) / 2


class _Products:
    """Scores of users in their order."""

    def __init__(self, users: Tensor, items: Tensor):
        self._parts, self._items = iter(users.split(rows_at_once(len(items), len(users)))), items

    def score(self, histories: Histories) -> Tensor:
        return next(self._parts) @ self._items.T


_TASKS = {"softmax and gradient": _softmax, "ranking": _ranking}


def _in_a_process(task: str | None, ours: bool, n_items: int, width: int, users: int) -> None:
    inputs = _inputs(n_items, width, users)
    if task is not None:
        _TASKS[task](ours, *inputs)


def bench_score(sizes: list[int], width: int, users: int, runs: int, progress: bool = True) -> list[dict[str, Any]]:
    """A row per number of items and task. Equality is checked first (1e-4 relative for gradients; a rank may differ by
    one place where two products round differently). GiB: the peak beyond a process that only makes the inputs."""
    rows = []
    with Progress("scoring", len(sizes) * len(_TASKS), progress) as bar:
        for n_items in sizes:
            inputs = _inputs(n_items, width, users)
            base = peak_memory(_in_a_process, None, True, n_items, width, users)
            for task, work in _TASKS.items():
                ours, theirs = work(True, *inputs), work(False, *inputs)
                scale = theirs.abs().max() * _TOLERANCE if task != "ranking" else 1.0
                if float((ours - theirs).abs().max()) > scale:
                    raise AssertionError(f"{task} of {n_items} items differs from plain torch")
                del ours, theirs
                _, times = side_by_side([partial(work, mine, *inputs) for mine in (True, False)], runs)
                memory = [peak_memory(_in_a_process, task, mine, n_items, width, users) - base
                          for mine in (True, False)]
                rows.append({"items": n_items, "task": task, "ours_seconds": min(times[0]),
                             "torch_seconds": min(times[1]), "ours_gib": memory[0], "torch_gib": memory[1]})
                bar.advance()
    return rows


def main(*, sizes: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None, width: int = 576,
         batch_size: int = 128, runs: int = 3, quiet: bool = False,
         json_file: Annotated[Path | None, Parameter(name="--json")] = None) -> None:
    """Time and memory of the softmax over all items (with gradient) and of ranking them, ours and plain torch's.

    Parameters
    ----------
    sizes
        Numbers of items; 10,000, 100,000 and 1,000,000 if not given.
    width
        Of the embeddings.
    batch_size
        Users at once.
    runs
        Timed runs of each.
    quiet
        No progress.
    json_file
        Write the numbers to this file.
    """
    rows = bench_score(sizes or [10_000, 100_000, 1_000_000], width, batch_size, runs, not quiet)
    table = Table("items", "task", "ours s", "torch s", "ours GiB", "torch GiB",
                  title=f"{batch_size} users, {width} wide; memory of a fresh process beyond items and libraries")
    for row in rows:
        table.add_row(f"{row['items']:,}", row["task"], *(f"{row[name]:.2f}" for name in (
            "ours_seconds", "torch_seconds", "ours_gib", "torch_gib")))
    Console().print(table)
    if json_file is not None:
        write_json(json_file, {"machine": describe(), "rows": rows})


if __name__ == "__main__":
    run(main)
