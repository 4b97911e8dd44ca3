"""A fitted Laser with one part taken out or disturbed, to see what the part gives. Nothing is trained again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laserrec.data.histories import Histories
from laserrec.methods.laser.id_states import IdStates
from laserrec.methods.laser.model import Laser
from laserrec.methods.laser.sides import SummedUsers

NO_RANKER = "without the ranking network"
Variant = Callable[[], AbstractContextManager[None]]
"""Makes a context in which the model is changed; afterwards it is as before."""


def variants(laser: Laser, some_users: Histories) -> dict[str, Variant]:
    """Name -> change, for each part that this model has. What a ranker has learnt about all parts means nothing without
    one of them, so it is taken out first, and out in all others too. some_users: training sequences by whose cosines
    the neighbours' scale is set anew, as in a fit (laserrec.methods.laser.task.scale_histories)."""
    found: dict[str, Variant] = {}
    side, reader = laser.user_side, laser.reader
    if isinstance(side, SummedUsers) and side.more:
        summed = side.sums_alone()
        found[f"without {side.more}"] = lambda: _with(laser, user_side=summed)
    if reader is not None:
        if reader.mformer is not None or reader.learned_prefix is not None:
            found["without the prefix"] = lambda: _with(reader, mformer=None, learned_prefix=None)
        if reader.mformer is not None and reader.mformer.router is not None:
            found["one expert for all users"] = lambda: _one_expert(laser, some_users)
        if reader.mformer is not None and reader.ids.model is not None:
            swapped = OtherUsers(reader.ids)
            found["prefix of another user's ID states"] = lambda: _with(reader, ids=swapped)
    if laser.id_share:
        found["without the ID part"] = lambda: _one_part(laser, 0.0)
        found["without the text part"] = lambda: _one_part(laser, 1.0)
    if laser.neighbours is not None:
        found["without neighbours"] = lambda: _with(laser, neighbours=None)
    if laser.seen is not None:
        found["without the seen offset"] = lambda: _with(laser, seen=None)
    if laser.ranker is not None:
        found = {NO_RANKER: lambda: _with(laser), **found}
    return {name: _rescaled(laser, some_users, change) for name, change in found.items()}


class OtherUsers(IdStates):
    """Gives each user of a batch the states of the one before."""

    def __init__(self, ids: IdStates):
        self.__dict__.update(vars(ids))

    def states(self, histories: Histories, hide: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As IdStates.states; a batch of one user keeps its own."""
        return super().states(histories.take(torch.arange(len(histories)).roll(1)), hide)


@contextmanager
def _with(owner: Any, **parts: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in parts}
    for name, part in parts.items():
        setattr(owner, name, part)
    try:
        yield
    finally:
        for name, part in before.items():
            setattr(owner, name, part)


@contextmanager
def _one_expert(laser: Laser, some_users: Histories) -> Iterator[None]:
    """The expert that most of these users have."""
    assert laser.reader is not None and laser.reader.mformer is not None
    mformer, route = laser.reader.mformer, laser.reader.route(some_users)
    assert route is not None
    most = int(route.users_per_expert().argmax())
    experts = mformer.experts.data
    mformer.experts.data = experts[[most]]
    try:
        with _with(mformer, router=None):
            yield
    finally:
        mformer.experts.data = experts


@contextmanager
def _one_part(laser: Laser, share: float) -> Iterator[None]:
    """share: 0, the text alone, or 1, the IDs alone. Items to which an ID part was lent by text keep that one."""
    before, vectors, d = laser.id_share, laser.vectors, laser.d_text
    part = F.pad(vectors[:, d:], (d, 0)) if share else vectors[:, :d]
    laser.id_share = share
    laser.set_items(F.normalize(part, dim=-1))
    try:
        yield
    finally:
        laser.id_share = before
        laser.set_items(vectors)


def _rescaled(laser: Laser, some_users: Histories, change: Variant) -> Variant:
    @contextmanager
    def changed() -> Iterator[None]:
        neighbours = laser.neighbours
        scale = None if neighbours is None else neighbours.log_scale.clone()
        try:
            with _with(laser, ranker=None), change():
                laser.scale_neighbours(some_users)
                yield
        finally:
            if neighbours is not None and scale is not None:
                neighbours.log_scale.copy_(scale)

    return changed
