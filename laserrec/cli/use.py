"""Commands that use a fitted model: `laserrec evaluate` and `recommend`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from laserrec.cli.options import (
    OPENING,
    READING,
    Data,
    Index,
    JsonFile,
    Model,
    Opening,
    Quiet,
    Reading,
    Switch,
    finish,
    item_ids,
    say,
)
from laserrec.cli.output import print_recommendations, print_results
from laserrec.util.errors import UserError
from laserrec.util.io import check_file, check_folder


def evaluate(data: Data, models: list[str], *, split: Literal["validation", "test"] = "test", k: int = 10,
             ranks: Path | None = None, record: Switch = False, opening: Opening = OPENING, quiet: Quiet = False,
             json_file: JsonFile = None) -> None:
    """Rank all items for every user of a split, with each model, and print one table.

    Examples:
      laserrec evaluate runs/data runs/model runs/sasrec ease --json results.json
      laserrec evaluate runs/data runs/model --record

    Parameters
    ----------
    models
        Model folders, models on the hub (ORG/NAME[@REVISION]), popularity or ease (fitted on DATA at once).
    split
        validation or test. Choose settings on validation only.
    k
        Cut-off of Recall and NDCG.
    ranks
        Folder for a parquet file per model with each user's rank (for significance tests).
    record
        Keep each model folder's numbers in that folder, for its card.
    """
    from laserrec.data.dataset import Dataset
    from laserrec.evaluation.evaluate import evaluate as run
    from laserrec.evaluation.evaluate import save_ranks
    from laserrec.recommender.hub import is_repo
    from laserrec.recommender.results import record_result
    from laserrec.recommender.scorers import check_scorer, flattered, load_scorer
    from laserrec.util.device import choose
    from laserrec.util.progress import Progress

    if k < 1:
        raise UserError(f"k is {k}; it must be at least 1")
    if ranks is not None:
        check_folder(ranks)
    if record and (far := [name for name in models if is_repo(name)]):
        raise UserError(f"--record keeps numbers in a model's folder, and {far[0]} is none here; evaluate the folder "
                        "and push it again")
    for name in models:
        check_scorer(name)
    dataset, device, rows = Dataset.load(data), choose(opening.device), []
    try:
        for name, file in zip(models, _file_names(models), strict=True):
            scorer, batch_size = load_scorer(name, dataset, device, opening.backbone, opening.trust_remote_code)
            with Progress(f"evaluating {name}", len(dataset.cases(split)), not quiet) as bar:
                result = run(name, scorer, dataset, split, k, batch_size, bar.advance)
            rows.append(result.row())
            if flattered(scorer, split):
                say(f"{name}: its ranking network was trained on validation users, so its figures tell too much here; "
                    "laserrec fit told those for users that it was not trained on")
            if ranks is not None:
                save_ranks(path := ranks / f"{file}-{split}.parquet", dataset, split, result.ranks)
                rows[-1]["ranks"] = str(path)
            if record and (Path(name) / "model.json").is_file():
                record_result(Path(name), result, dataset)
    finally:  # what was measured is not lost where a later model can't be loaded
        if rows:
            print_results(rows, k, f"{split} split, all {dataset.n_items:,} items ranked, nothing filtered")
            finish(rows, json_file)


def _file_names(models: list[str]) -> list[str]:
    """A distinct file name for each model, made of its whole path: many folders are called model."""
    names: list[str] = []
    for model in models:
        own = base = re.sub(r"[^\w.@]+", "-", model).strip("-.") or "model"
        count = 1
        while own in names:
            own = f"{base}-{(count := count + 1)}"
        names.append(own)
    return names


def recommend(model: Model, *, history: str | None = None, histories: Path | None = None, out: Path | None = None,
              reading: Reading = READING, k: int = 10, exclude_seen: Switch = False,
              exclude: str | None = None, unknown: Literal["error", "drop"] = "error", index: Index = None,
              opening: Opening = OPENING, json_file: JsonFile = None) -> None:
    """Recommend the next items for one history, or for a file of histories.

    Examples:
      laserrec recommend runs/model --history B00TNNWMXI,B00IBZE2EQ
      laserrec recommend runs/model --histories users.csv --out recommendations.parquet
      laserrec recommend my-shop/laser-tools --history SKU-17,SKU-4 --exclude SKU-9

    Parameters
    ----------
    history
        Item ids, oldest first, separated by commas.
    histories
        A file, folder of parts or pattern: user_id and item_id, oldest first or with a timestamp, or lists of ids.
    out
        Where to write the recommendations of --histories (.csv or .parquet); else they are printed.
    k
        Items per user.
    exclude_seen
        Leave out the history's own items.
    exclude
        Item ids that nobody is recommended, separated by commas.
    unknown
        drop leaves out history items that are not in the catalogue.
    """
    from laserrec.data.tables import read_whole, write_frame

    if history is not None and histories is None:
        asked = [item_ids(history)]
    elif histories is not None and history is None:
        asked = read_whole(histories, reading.options())
    else:
        raise UserError("give either --history ID,ID,... or --histories FILE")
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise UserError(f"{out}: ending {out.suffix!r} is not one of .csv, .parquet")
    if out is not None:
        check_file(out)
    loaded = opening.open(model)
    loaded.use_index(index)
    frame = loaded.recommend(asked, k=k, exclude_seen=exclude_seen, unknown=unknown,
                             exclude=None if exclude is None else item_ids(exclude))
    finish(frame.to_dicts(), json_file)
    if out is not None:
        write_frame(out, frame)
        say(f"{frame.height:,} recommendations for {frame['user_id'].n_unique():,} users in {out}")
        return
    print_recommendations(frame, loaded.items)
