"""Commands that train: `laserrec fit`, `pretrain`, `distil` and `quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from laserrec.cli.options import (
    FITTING,
    OPENING,
    ConfigFile,
    Data,
    Device,
    Fitting,
    Flags,
    JsonFile,
    Model,
    ModelOut,
    Opening,
    Quiet,
    RefitFlags,
    finish,
    given,
    say,
    settings,
)
from laserrec.cli.output import print_results
from laserrec.cli.settings import StudentSettings
from laserrec.config import Config, IdModelKind, StudentConfig, valid
from laserrec.util.errors import UserError

if TYPE_CHECKING:
    from laserrec.data.dataset import Dataset
    from laserrec.recommender.recommender import LaserRecommender


def fit(data: Data, out: ModelOut, *, method: str = "laser", id_model: Path | None = None, how: Fitting = FITTING
        ) -> None:
    """Fit a method on a data folder, into a model folder. Run again to resume.

    Laser's ID model is fitted first, into OUT/id_model, unless --id-model names one.

    Examples:
      laserrec fit runs/data runs/model --train.lr 1e-3
      laserrec fit runs/data runs/sasrec --method sasrec --device cuda
      torchrun --nproc-per-node 4 -m laserrec fit runs/data runs/model --id-model runs/sasrec

    Parameters
    ----------
    method
        laser, sasrec, bert4rec, gru4rec, ease, ease-text, nearest-text, popularity, lrurec, llamarec, recformer,
        llm4rec, fdsa, zesrec, kar or recguru.
    id_model
        Of laser: the model folder of a sasrec, bert4rec or gru4rec fitted on DATA.
    """
    from laserrec.util.distributed import join

    join()  # first of all, so that of several processes that fail one alone says why
    _fit(data, out, method, how, id_model)


def pretrain(data: Data, out: ModelOut, *, how: Fitting = FITTING) -> None:
    """Fit an ID model for Laser, to be given to fit with --id-model. Run again to resume.

    It is laserrec fit with its kind as --method, but for its item table, which is Laser's (id_model.items): in the
    preset small it starts from the LLM's embeddings.

    Example: laserrec pretrain runs/data runs/id_model --id-model.kind sasrec
    """
    below = how.settings("laser").id_model
    if below.kind == IdModelKind.NONE:
        raise UserError("these settings have no ID model (id_model.kind is none); give --id-model.kind sasrec, "
                        "bert4rec or gru4rec")
    config = how.settings(below.kind.value)
    own = config.id_model.model_copy(update={"items": below.items})
    _fit(data, out, below.kind.value, how, config=config.model_copy(update={"id_model": own}))


def _fit(data: Path, out: Path, method: str, how: Fitting, id_model: Path | None = None, config: Config | None = None
         ) -> None:
    from laserrec.data.dataset import Dataset
    from laserrec.recommender.recommender import LaserRecommender
    from laserrec.util.distributed import join

    config, dataset, there = config or how.settings(method), Dataset.load(data), (out / "model.json").is_file()
    model = LaserRecommender.fit_dataset(dataset, config, out, method, id_model, how.device, not how.quiet,
                                         how.trust_remote_code)
    if join().is_main:
        finish(_tell_fit(model, dataset, out, there), how.json_file)


def _tell_fit(model: LaserRecommender, dataset: Dataset, out: Path, there: bool) -> dict[str, Any]:
    """Print how good the model is and what it took; the numbers. there: it was fitted before."""
    from laserrec.recommender.validated import validated

    facts = model.facts["training"]
    kept, found = facts["kept"], {name: value for name, value in validated(facts).items() if name.startswith("ndcg@")}
    quality = "".join(f"validation {name.upper()} {value:.4f}" for name, value in found.items()) or "not validated"
    where = f"{kept['phase']}, epoch {kept['epoch']}" if kept.get("epoch") else kept.get("phase", "nothing to train")
    was_there = " (was there already)" if there else ""
    say(f"{model.method} in {out}: {quality} ({where}), {facts['seconds']:.0f} s{was_there}")
    _tell_parts(facts.get("parts"))
    return {"method": model.method, **facts, "new_items": _tell_new_items(model, dataset)}


def _tell_parts(parts: dict[str, Any] | None) -> None:
    """What each part of the score gives on validation."""
    if not parts:
        return
    ndcg = parts["ndcg@10"]
    worth = [f"{name.removeprefix('without ')} {100 * (ndcg['chosen'] / max(ndcg[name], 1e-9) - 1):+.1f}%"
             for name in ndcg if name.startswith("without")]
    say(f"parts weighed on {parts['users']:,} validation users: NDCG@10 {ndcg['chosen']:.4f}, with the settings as "
        f"given {ndcg['given']:.4f}; each part adds: {', '.join(worth)}")
    if network := parts.get("network"):
        gain = 100 * (network["network"] / max(network["blend"], 1e-9) - 1)
        say(f"ranked anew by a network, for users that it was not trained on: {gain:+.1f}%"
            f"{'' if network['kept'] else '; not kept'}")


def _tell_new_items(model: LaserRecommender, dataset: Dataset) -> int:
    """How many items of the data folder without enough interactions are in the catalogue."""
    count = dataset.new_items.height
    taken = count and not model.unknown_items(dataset.new_items["item_id"].to_list())
    if taken:
        say(f"{count:,} items without enough interactions can be recommended too, by their text")
    elif count:
        say(f"{count:,} items without enough interactions are left out: {model.method} can't take items that it was "
            "not fitted on")
    return count if taken else 0


def refit(model: Model, data: Data, out: ModelOut, *, opening: Opening = OPENING, quiet: Quiet = False,
          json_file: JsonFile = None, flags: RefitFlags = None) -> None:
    """Go on from a fitted model with newer data: new interactions, users and items. Run again to resume.

    Training starts from MODEL's weights and is short for laser, sasrec, bert4rec, gru4rec, zesrec and recformer. Other
    methods are fitted from nothing, with all epochs. DATA holds all interactions that there are now, old and new;
    items are known by their item_id. MODEL stays as it is. A server takes OUT without a restart: POST /v1/model.
    Settings of the training can be changed by flags, such as --train.lr 1e-4; laserrec settings lists them all.

    Example: laserrec refit runs/model runs/data-december runs/model-december
    """
    from laserrec.data.dataset import Dataset

    dataset, there = Dataset.load(data), (out / "model.json").is_file()
    made = opening.open(model).refit(dataset, out, given(flags), not quiet)
    if (warm := made.facts.get("warm_start")) is not None:
        say(f"{warm['carried_items']:,} items known, {warm['new_items']:,} new, {warm['dropped_items']:,} no longer in "
            "the data")
    finish({**_tell_fit(made, dataset, out, there), "warm_start": warm}, json_file)


def distil(data: Path, model: Model, out: Path, *, opening: Opening = OPENING, quiet: Quiet = False,
           json_file: JsonFile = None,
           flags: Annotated[StudentSettings | None, Parameter(name="*", show_default=False)] = None) -> None:
    """Make of a fitted Laser a model that answers without the LLM, at an ID model's speed. Run again to resume.

    For presets in which the LLM reads histories (bi-tuning, paper); a model of the default preset needs none already.

    Example: laserrec distil runs/data runs/model runs/fast

    Parameters
    ----------
    data
        The data folder that MODEL was fitted on, or another of the same catalogue. Its training sequences are used.
    out
        The model folder to make. It takes MODEL's place in recommend, batch, serve and the rest.
    """
    from laserrec.data.dataset import Dataset
    from laserrec.recommender.distil import distil as work

    config, teacher = valid(StudentConfig, given(flags), "flags"), opening.open(model)
    facts: dict[str, Any] = work(teacher, Dataset.load(data), out, config, not quiet).facts["student"]
    print_results([{"model": name, **row} for name, row in facts["validation"].items()], teacher.config.eval.k,
                  "validation split")
    say(f"{facts['histories']:,} histories, {facts['seconds']:.0f} s; {out} answers without the LLM")
    finish(facts, json_file)


def quickstart(out: Path = Path("runs/quickstart"), *, device: Device = "auto", config: ConfigFile = None,
               quiet: Quiet = False, json_file: JsonFile = None, flags: Flags = None) -> None:
    """Prepare, fit, recommend and compare on amazon-scientific. Run again to resume or to see it again.

    Example: laserrec quickstart

    Parameters
    ----------
    out
        Everything is kept here; the table is OUT/results.json.
    """
    from laserrec.experiments.quickstart import run

    finish(run(out, settings("quickstart", config, flags), not quiet, device), json_file)
