"""`laserrec index`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cyclopts import App

from laserrec.cli.options import OPENING, JsonFile, Model, Opening, finish, say
from laserrec.util.errors import UserError

index_app = App(name="index", help="Indexes of item vectors, for catalogues too large to compare with all.")


@index_app.command
def build(model: Model, out: Path, *, kind: Literal["exact", "usearch", "qdrant"] = "usearch", url: str | None = None,
          collection: str | None = None, queries: int = 200, opening: Opening = OPENING, json_file: JsonFile = None
          ) -> None:
    """Build an index of all items and measure how much of the exact top 10 it finds.

    Example: laserrec index build runs/model runs/index --kind usearch

    Then: laserrec recommend, batch or serve runs/model --index runs/index. The index is of the catalogue as it is now:
    after a new fit, build it again. Items that a server adds or removes later are handled beside it.

    Parameters
    ----------
    out
        The index's folder. An index that is there is replaced once the new one is complete.
    kind
        exact compares with all; usearch is a graph in one file; qdrant a collection on a server.
    url
        Of the Qdrant server.
    collection
        The collection's name on that server, one for each model. Default: items.
    queries
        Random histories that the recall is measured with.
    """
    from laserrec.recommender.indexing import build_index
    from laserrec.retrieval.build import check_place
    from laserrec.retrieval.index import IndexKind

    if queries < 1:
        raise UserError(f"queries is {queries}; it must be at least 1")
    check_place(IndexKind(kind), out, url)
    result = build_index(opening.open(model), IndexKind(kind), out, url, queries, collection=collection)
    say(f"{result['items']:,} items, {result['width']} wide, in {result['seconds']:.1f} s, "
        f"{result['bytes'] / 2**20:.1f} MiB; recall@10 against exact {result['recall@10']:.3f} over "
        f"{result['queries']} random histories")
    finish(result, json_file)
