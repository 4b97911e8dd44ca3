"""Tables that commands print."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], folded: str = "") -> None:
    """Cells as they are: brackets in names and titles are no markup. folded: the column that is folded where the
    terminal is narrow; the others never are."""
    table = Table(*(Column(name, no_wrap=name != folded, overflow="fold") for name in columns), title=Text(title))
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console().print(table)


def print_results(rows: list[dict], k: int, title: str) -> None:
    """The one results table."""
    metrics = (f"recall@{k}", f"ndcg@{k}", "mrr")
    print_table(title, ("model", f"Recall@{k}", f"NDCG@{k}", "MRR", "users", "seconds"), (
        (row["model"], *(f"{row[m]:.4f}" for m in metrics), f"{row['users']:,}", f"{row['seconds']:.1f}")
        for row in rows), folded="model")


def print_recommendations(frame: pl.DataFrame, items: pl.DataFrame) -> None:
    """User, rank, score, id and title."""
    titles = dict(zip(items["item_id"].to_list(), items["title"].to_list(), strict=True))
    print_table("recommended next", ("user", "rank", "score", "item", "title"), (
        (row["user_id"], row["rank"], f"{row['score']:.3f}", row["item_id"], titles[row["item_id"]] or "")
        for row in frame.iter_rows(named=True)), folded="title")
