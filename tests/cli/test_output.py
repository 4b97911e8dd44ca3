"""Tables show names and titles as they are."""

import polars as pl

from laserrec.cli.options import say
from laserrec.cli.output import print_recommendations, print_results


def test_brackets_are_no_markup(capsys, monkeypatch):
    """Rich would drop [red] and stop at [/]."""
    monkeypatch.setenv("COLUMNS", "200")
    frame = pl.DataFrame({"user_id": ["[bold]"], "rank": [1], "score": [0.5], "item_id": ["i[/]"]})
    print_recommendations(frame, pl.DataFrame({"item_id": ["i[/]"], "title": ["Glue [red] [/5]"]}))
    print_results([{"model": "runs/[a]", "recall@5": 0.1, "ndcg@5": 0.1, "mrr": 0.1, "users": 3, "seconds": 1.0}], 5,
                  "test [/]")
    say("runs/[a] " + "x" * 300)
    out = capsys.readouterr().out
    assert all(text in out for text in ("[bold]", "i[/]", "Glue [red] [/5]", "runs/[a]", "test [/]", "x" * 300))
