"""The softmax over all items and the ranking of all items, ours beside plain torch, in time and memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from laserrec.bench.machine import peak_memory, side_by_side
from laserrec.data.dataset import Cases
from laserrec.evaluation.evaluate import rank_cases
from laserrec.methods.losses import item_contrast
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
        order = iter(users.split(rows_at_once(len(items), len(users))))
        cases = Cases(np.arange(len(users)), [np.array([1])] * len(users), targets.numpy() + 1)
        ranks = rank_cases(lambda _: next(order) @ items.T, cases, rows_at_once(len(items), len(users)), len(items))
        return torch.as_tensor(ranks.plain)
    scores = users @ items.T
    own = scores.gather(1, targets[:, None])
    return (scores > own).sum(dim=1) + 1.0 + ((scores == own).sum(dim=1) - 1) / 2


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
