"""What the commands print."""

from __future__ import annotations

import polars as pl
from rich.console import Console
from rich.table import Table


def print_results(rows: list[dict], k: int, title: str) -> None:
    """The one results table."""
    table = Table("model", f"Recall@{k}", f"NDCG@{k}", "MRR", "users", "seconds", title=title)
    for row in rows:
        table.add_row(str(row["model"]), *(f"{row[m]:.4f}" for m in (f"recall@{k}", f"ndcg@{k}", "mrr")),
                      f"{row['users']:,}", f"{row['seconds']:.1f}")
    Console().print(table)


def print_recommendations(frame: pl.DataFrame, items: pl.DataFrame) -> None:
    """User, rank, score, id and title."""
    titles = dict(zip(items["item_id"].to_list(), items["title"].to_list(), strict=True))
    table = Table("user", "rank", "score", "item", "title", title="recommended next")
    for row in frame.iter_rows(named=True):
        table.add_row(str(row["user_id"]), str(row["rank"]), f"{row['score']:.3f}", row["item_id"],
                      titles[row["item_id"]] or "")
    Console().print(table)
