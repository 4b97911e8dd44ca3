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


def test_at_80_columns_titles_are_folded_and_nothing_else(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    title = " ".join(f"word{n}" for n in range(40))
    frame = pl.DataFrame({"user_id": ["A3CL7TRF0JUY4Q"], "rank": [10], "score": [-0.25], "item_id": ["B00TNNWMXI"]})
    print_recommendations(frame, pl.DataFrame({"item_id": ["B00TNNWMXI"], "title": [title]}))
    out = capsys.readouterr().out
    assert all(text in out for text in ("A3CL7TRF0JUY4Q", " 10 ", "-0.250", "B00TNNWMXI", *title.split()))
    print_results([{"model": "runs/" + "x" * 60, "recall@10": 0.1, "ndcg@10": 0.1, "mrr": 0.1, "users": 123456,
                    "seconds": 1234.5}], 10, "test")
    out = capsys.readouterr().out
    assert all(text in out for text in ("Recall@10", "123,456", "1234.5")) and out.count("x") == 60
