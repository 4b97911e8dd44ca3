"""`laserrec index`. Thin, as cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console

from laserrec.util.io import write_json

index_app = App(name="index", help="Indexes of item embeddings, for catalogues too large to compare with all.")
out_console = Console()


@index_app.command
def build(model: Path, out: Path, *, kind: Literal["exact", "usearch", "qdrant"] = "usearch", url: str | None = None,
          collection: str = "items", queries: int = 200,
          json_file: Annotated[Path | None, Parameter(name="--json")] = None) -> None:
    """Build an index of all items and say how much of the exact top 10 it finds.

    Example: laserrec index build runs/model runs/index --kind usearch

    Then: laserrec recommend, batch or serve runs/model --index runs/index. The index is of the catalogue as it is now:
    after a new fit it is built again. Items that a server adds are seen to beside it.

    Parameters
    ----------
    model
        A model folder, or ORG/NAME[@REVISION] on the Hugging Face Hub.
    out
        The index's folder.
    kind
        exact compares with all; usearch is a graph in one file; qdrant a collection.
    url
        A Qdrant server; without it the collection is kept in OUT.
    collection
        The collection's name on that server, one for each model.
    queries
        Random histories that the recall is measured with.
    json_file
        Write the numbers to this file.
    """
    from laserrec.recommender.recommender import LaserRecommender
    from laserrec.retrieval.build import build_index
    from laserrec.retrieval.index import IndexKind

    result = build_index(LaserRecommender.from_pretrained(model), IndexKind(kind), out, url, queries,
                         collection=collection)
    out_console.print(f"{result['items']:,} items, {result['width']} wide, in {result['seconds']:.1f} s, "
                      f"{result['bytes'] / 2**20:.1f} MiB; recall@10 against exact {result['recall@10']:.3f} over "
                      f"{result['queries']} random histories", highlight=False)
    if json_file is not None:
        write_json(json_file, result)
