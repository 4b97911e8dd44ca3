"""The folder of an index: its files, and index.json: what it is, of which catalogue, and its files' checksums.

A folder may come from a stranger or from a bad disk. Its JSON is read against a schema, sizes and checksums are
compared and links refused before a library sees a file, and nothing in it is a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, Field
from torch import Tensor

from laserrec.retrieval.exact import ExactIndex
from laserrec.retrieval.graph import UsearchIndex
from laserrec.retrieval.index import Index, IndexKind
from laserrec.retrieval.qdrant import QdrantIndex
from laserrec.util import manifest
from laserrec.util.errors import UserError
from laserrec.util.io import new_folder, read_record, recover, write_json

AGAIN = "build the index again"
_NOTE, _FORMAT = "index.json", 2
_KINDS = {IndexKind.EXACT: ExactIndex, IndexKind.USEARCH: UsearchIndex, IndexKind.QDRANT: QdrantIndex}


class IndexFacts(BaseModel, strict=True):
    """index.json."""

    format: int = 1
    """1 was a folder without checksums."""
    kind: Literal["exact", "usearch", "qdrant"]
    d: int = Field(ge=1, le=2**20)
    items: int = Field(0, ge=0, lt=2**40)
    catalogue: str = ""
    """`catalogue_sha256` of what was indexed; empty: not told."""
    files: dict[str, Any] = {}
    expansion: int = Field(256, ge=1, le=2**16)
    """Of a graph: candidates that a search looks at (`UsearchIndex.tune`)."""
    url: str | None = None
    """Of a Qdrant server, and the collection there."""
    collection: str = "items"


def make_index(kind: IndexKind, d: int, **place: Any) -> Index:
    """An empty index for vectors of width d. place: `url`, `collection` and `mark` of kind qdrant (`QdrantIndex`)."""
    return _KINDS[kind](d, **place)


@contextlib.contextmanager
def index_folder(folder: Path | str) -> Iterator[Callable[[Index, str], None]]:
    """Yields what writes an index, with its `catalogue_sha256`, into a new folder that `load_index` reads and that
    replaces an index in `folder` when the block ends. Raises UserError at the start for a folder that holds something
    else."""
    own = (_NOTE, *(name for kind in _KINDS.values() for name in kind.files))
    with new_folder(folder, replace=(_NOTE,) if _is_index(Path(folder)) else (), own=own) as new:

        def write(index: Index, catalogue: str) -> None:
            place = index.write(new)
            write_json(new / _NOTE, {"format": _FORMAT, "kind": str(index.kind), "d": index.d, "items": len(index),
                                     "catalogue": catalogue, "files": manifest.describe(new, _KINDS[index.kind].files),
                                     **place})

        yield write


def load_index(folder: Path | str, shared: bool = False) -> Index:
    """shared: to search only; then any number of processes may have it open, and usearch's file is mapped, so that they
    keep one copy in memory. Raises UserError if it is none, damaged, or of an earlier version, and where the Qdrant
    server doesn't have its collection."""
    folder = Path(folder)
    facts = index_facts(folder)
    kind = _KINDS[IndexKind(facts.kind)]
    if facts.format != _FORMAT:
        raise UserError(f"{folder} has format {facts.format} and this version reads format {_FORMAT}; {AGAIN}")
    if set(facts.files) != set(kind.files):
        raise UserError(f"{folder / _NOTE} is damaged: its files are not those of kind {facts.kind}; {AGAIN}")
    manifest.check(folder, facts.files, AGAIN, links=False)
    if kind is not QdrantIndex:
        index = kind.open(folder, facts.d, facts.items, shared)
        if isinstance(index, UsearchIndex):
            index.expansion = facts.expansion
        return index
    if not facts.url:
        raise UserError(f"{folder / _NOTE} is damaged: it lacks the url of the Qdrant server; {AGAIN}")
    return QdrantIndex(facts.d, facts.url, facts.collection, make=False)


def index_facts(folder: Path | str) -> IndexFacts:
    """What an index's folder is. Raises UserError if it is none or damaged."""
    note = Path(folder) / _NOTE
    recover(folder)
    if note.is_symlink():
        raise UserError(f"{note} is a link, which is not followed; {AGAIN}")
    if not note.is_file():
        raise UserError(f"{folder} is not a finished index; make one with laserrec index build")
    return read_record(note, IndexFacts, AGAIN)


def index_kind(folder: Path | str) -> IndexKind:
    """Raises UserError as `index_facts`."""
    return IndexKind(index_facts(folder).kind)


def _is_index(folder: Path) -> bool:
    with contextlib.suppress(UserError):
        return bool(index_facts(folder))
    return False


def catalogue_sha256(vectors: Float[Tensor, "items d"], rows: Int[Tensor, "live"]) -> str:
    """Tells one catalogue from another: all items' vectors, and which of them are recommended."""
    digest = hashlib.sha256(f"{tuple(vectors.shape)} ".encode() + np.ascontiguousarray(rows.cpu().numpy()).tobytes())
    for part in vectors.split(100_000):
        digest.update(np.ascontiguousarray(part.to("cpu", torch.float32).numpy()).data)
    return digest.hexdigest()
