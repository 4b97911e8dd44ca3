"""`laserrec index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console

from laserrec.util.errors import UserError
from laserrec.util.io import write_json

index_app = App(name="index", help="Indexes of item vectors, for catalogues too large to compare with all.")
out_console = Console()


@index_app.command
def build(model: Path, out: Path, *, kind: Literal["exact", "usearch", "qdrant"] = "usearch", url: str | None = None,
          collection: str | None = None, queries: int = 200, device: str = "auto",
          json_file: Annotated[Path | None, Parameter(name="--json")] = None) -> None:
    """Build an index of all items and measure how much of the exact top 10 it finds.

    Example: laserrec index build runs/model runs/index --kind usearch

    Then: laserrec recommend, batch or serve runs/model --index runs/index. The index is of the catalogue as it is now:
    after a new fit, build it again. Items that a server adds or removes later are handled beside it.

    Parameters
    ----------
    model
        A model folder, or ORG/NAME[@REVISION] on the Hugging Face Hub.
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
    device
        auto (a GPU where there is one), cpu, cuda, cuda:N or mps.
    json_file
        Write the numbers to this file.
    """
    from laserrec.recommender.indexing import build_index
    from laserrec.recommender.recommender import LaserRecommender
    from laserrec.retrieval.index import IndexKind

    if queries < 1:
        raise UserError(f"queries is {queries}; it must be at least 1")
    loaded = LaserRecommender.from_pretrained(model, device=device)
    result = build_index(loaded, IndexKind(kind), out, url, queries, collection=collection)
    out_console.print(f"{result['items']:,} items, {result['width']} wide, in {result['seconds']:.1f} s, "
                      f"{result['bytes'] / 2**20:.1f} MiB; recall@10 against exact {result['recall@10']:.3f} over "
                      f"{result['queries']} random histories", highlight=False)
    if json_file is not None:
        write_json(json_file, result)
