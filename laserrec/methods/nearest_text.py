"""The nearest items by text without a matrix of items x items: compared block by block, or found in a graph."""

from __future__ import annotations

import logging

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.util.memory import rows_at_once

_COMPARED = 200_000
"""Items up to which all pairs are compared; above, a graph finds nearly all of the nearest in far less time."""
_CONNECTIVITY, _EXPANSION = 16, 128
"""Of the graph: neighbours of a node, and candidates looked at while building and searching."""
_log = logging.getLogger(__name__)


@torch.no_grad()
def nearest(unit: Float[Tensor, "n_items d_text"], count: int) -> Int[np.ndarray, "n_items count"]:
    """Rows of the `count` other items of the largest cosine, in no order. unit: vectors of unit length.

    Above 200,000 items a graph (HNSW: Malkov & Yashunin 2018) is asked, by the extra usearch if it is installed: a few
    of the nearest may be missed, and the item itself then stands in their place.
    """
    if len(unit) > _COMPARED and (found := _by_graph(unit.cpu().numpy(), count)) is not None:
        return found
    parts, size = [np.zeros((0, count), np.int32)], rows_at_once(len(unit), 1024)
    for start in range(0, len(unit), size):
        cosines = unit[start : start + size] @ unit.T
        own = torch.arange(len(cosines), device=unit.device)
        cosines[own, own + start] = -torch.inf
        parts.append(cosines.topk(count, dim=1, sorted=False).indices.cpu().numpy().astype(np.int32))
    return np.concatenate(parts)


def _by_graph(unit: np.ndarray, count: int) -> np.ndarray | None:
    try:
        from usearch.index import Index
    except ImportError:
        _log.warning("the nearest of %d texts are found by comparing all pairs, which takes hours; faster: "
                     "pip install 'laserrec[usearch]'", len(unit))
        return None
    index = Index(ndim=unit.shape[1], metric="ip", dtype="f32", connectivity=_CONNECTIVITY,
                  expansion_add=_EXPANSION, expansion_search=max(_EXPANSION, count + 1))
    index.add(np.arange(len(unit), dtype=np.uint64), unit, threads=1)  # or the graph depends on timing
    out = np.repeat(np.arange(len(unit), dtype=np.int32)[:, None], count + 1, axis=1)
    for start in range(0, len(unit), 100_000):
        part = index.search(unit[start : start + 100_000], count + 1)
        there = np.arange(count + 1) < np.asarray(part.counts)[:, None]  # ty: ignore[missing-union-attribute]
        out[start : start + 100_000][there] = np.asarray(part.keys)[there].astype(np.int32)
    own = out == np.arange(len(unit))[:, None]
    order = np.argsort(own, axis=1, kind="stable")  # the item itself last
    return np.take_along_axis(out, order, axis=1)[:, :count]
