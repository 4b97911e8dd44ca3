"""`laserrec inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from laserrec.cli.options import OPENING, Data, JsonFile, Model, Opening, Quiet, Switch, finish, say
from laserrec.cli.output import print_table
from laserrec.util.errors import UserError


def inspect(data: Data, model: Model, *, split: Literal["validation", "test"] = "validation", users: int | None = None,
            k: int = 10, record: Switch = False, opening: Opening = OPENING, quiet: Quiet = False,
            json_file: JsonFile = None) -> None:
    """Tell what each part of a fitted model gives: rank the same users without it.

    Each row changes one thing in the fitted model: the LLM's or the transformer's reading of the history, the prefix,
    the router, another user's ID states, the ID part, the text part, the neighbours, the seen offset, the history's
    order. Nothing is trained again. A network that ranks items anew is taken out first, and the parts are compared
    with the model without it. It was trained on validation users, where its own row tells too much.

    Examples:
      laserrec inspect runs/data runs/model
      laserrec inspect runs/data runs/model --users 2000 --record --json parts.json

    Parameters
    ----------
    split
        Choose settings by validation only.
    users
        At most so many users of the split, drawn at random.
    k
        Cut-off of Recall and NDCG.
    record
        Keep the table in the model folder, for its report.
    """
    from laserrec.data.dataset import Dataset
    from laserrec.experiments.inspect import AS_FITTED
    from laserrec.experiments.inspect import inspect as run
    from laserrec.recommender.folder import update_note
    from laserrec.recommender.hub import is_repo
    from laserrec.util.progress import Progress

    for name, value in (("users", users), ("k", k)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if record and is_repo(model):
        raise UserError(f"--record keeps the table in a model's folder, and {model} is none here")
    dataset, loaded = Dataset.load(data), opening.open(model)
    count = len(dataset.cases(split)) if users is None else min(users, len(dataset.cases(split)))

    @contextmanager
    def told(name: str) -> Iterator[Any]:
        with Progress(name, count, not quiet) as bar:
            yield bar.advance

    rows, cosine = run(loaded, dataset, split, users, k, told)
    print_table(f"{split} split, {count:,} users, all {dataset.n_items:,} items ranked", (
        "part", f"NDCG@{k}", "difference (95%)", "adds"), (_cells(row, k) for row in rows), folded="part")
    if cosine is not None:
        say(f"cosine of a user's vector with itself after shuffling the history: {cosine:.3f} (1: order is not read)")
    if record:
        changed = [row for row in rows if row["part"] != AS_FITTED]
        update_note(Path(model), parts=[{"part": row["part"], "split": split, "users": count, **{
            key: round(value, 5) for key, value in row.items() if isinstance(value, float)}} for row in changed])
    finish({"split": split, "users": count, "rows": rows, "shuffle_cosine": cosine}, json_file)


def _cells(row: dict[str, Any], k: int) -> tuple[str, ...]:
    shown = (row["part"], f"{row[f'ndcg@{k}']:.4f}")
    if "difference" not in row:
        return *shown, "", ""
    gain = row["gain_percent"]
    return (*shown, f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})",
            "all" if gain is None else f"{gain:+.1f}%")
