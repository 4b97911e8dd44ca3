"""The model card: README.md of a model folder, with the metadata block that the Hugging Face Hub reads.

Everything in it is taken from model.json, so that it says nothing that was not recorded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import polars as pl

from laserrec.config import IdModelKind, Layout
from laserrec.config.rivals import FOLDERS
from laserrec.llm.fetch import DEFAULT_NAME, LICENCE, ORIGINAL
from laserrec.methods.all import find_method
from laserrec.recommender.validated import trained_on_validation, validated
from laserrec.util.io import write_text

_MARK = "<!-- Written by laserrec, which writes it anew. Delete this line to keep a text of your own. -->"
_NOT_STATED = "not stated"
_PAPER = "https://arxiv.org/abs/2409.01605"
_CITATION = """@misc{zhang2024laser,
  title = {Laser: Parameter-Efficient LLM Bi-Tuning for Sequential Recommendation with Collaborative Information},
  author = {Xinyu Zhang and Linmei Hu and Luhao Zhang and Dandan Song and Heyan Huang and Liqiang Nie},
  year = {2024},
  eprint = {2409.01605},
  archivePrefix = {arXiv},
  primaryClass = {cs.IR}
}"""
# Identifiers of https://huggingface.co/docs/hub/repositories-licenses that fit weights; any other is "other" there.
_LICENCES = ("afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0",
             "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0",
             "cdla-permissive-2.0", "eupl-1.1", "gpl-2.0", "gpl-3.0", "isc", "lgpl-2.1", "lgpl-3.0", "mit", "mpl-2.0",
             "odc-by", "odbl", "openrail", "osl-3.0", "pddl", "unlicense", "zlib")


def write_card(folder: Path, note: dict[str, Any], name: str | None = None) -> bool:
    """Write README.md for `note`, a model.json. name: the repository's, ORG/NAME; else the folder's.
    Returns False, and leaves the file alone, where a person wrote it."""
    file = folder / "README.md"
    if file.is_file() and _MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return False
    write_text(file, card_text(note, name or folder.resolve().name, _two_items(folder, note)))
    return True


def card_text(note: dict[str, Any], name: str, item_ids: list[str]) -> str:
    """The whole card. item_ids: for the example."""
    from huggingface_hub import ModelCard

    parts = [_MARK, f"# {name}", _what(note), _table("Data", _data(note)), _metrics(note),
             _table("Settings", _settings(note)), _table("Parameters", _parameters(note)),
             *([_table("The frozen LLM", _backbone(note))] if note["backbone"] else []), _usage(note, name, item_ids),
             _licence(note), *([_cite()] if note["method"] == "laser" else [])]
    card = ModelCard(f"---\n{_metadata(note, name).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    return str(card)


def _metadata(note: dict[str, Any], name: str) -> Any:
    from huggingface_hub import ModelCardData

    base = _base_model(note) if _needs_llm(note) else None
    results = _eval_results(note)
    tags = ["recommender-system", "sequential-recommendation"]
    # No pipeline_tag: the hub has none for recommending, and another would offer a widget that can't work.
    return ModelCardData(
        library_name="laserrec", base_model=base,
        tags=[*tags, "prompt-tuning", "arxiv:2409.01605"] if note["method"] == "laser" else tags,
        metrics=sorted({r.metric_type for r in results}) or None, eval_results=results or None,
        model_name=name.rpartition("/")[2], **_licence_fields(_card(note).get("licence")),
        **({"base_model_relation": "adapter"} if base and note["method"] == "laser" else {}))


def _licence_fields(licence: str | None) -> dict[str, Any]:
    if licence is None:
        return {}
    if licence.lower() in _LICENCES:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")}


def _eval_results(note: dict[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    name = _card(note).get("data_name")
    kind = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") if name else "own"
    return [EvalResult(task_type="sequential-recommendation", task_name="Sequential recommendation", dataset_type=kind,
                       dataset_name=name or _NOT_STATED, dataset_split=row["split"], metric_type=metric,
                       metric_name=_title(metric), metric_value=round(row[metric], 4))
            for row in _rows(note) for metric in _measures(row)]


def _rows(note: dict[str, Any]) -> list[dict[str, Any]]:
    """The fit's validation metrics, then what was recorded of evaluations."""
    training, recorded = note.get("training", {}), note.get("results", [])
    if trained_on_validation(training):
        recorded = [row for row in recorded if row["split"] != "validation"]
    fit = validated(training)
    if any(row["split"] == "validation" for row in recorded) or not fit:  # a measurement of all users is the better one
        return recorded
    return [{"split": "validation", **fit}, *recorded]


def _measures(row: dict[str, Any]) -> list[str]:
    return [key for key in row if key.startswith(("recall@", "ndcg@")) or key == "mrr"]


def _title(metric: str) -> str:
    return metric.upper() if metric.startswith(("ndcg", "mrr")) else metric.capitalize()


def _card(note: dict[str, Any]) -> dict[str, Any]:
    return note.get("card", {})


def _needs_llm(note: dict[str, Any]) -> bool:
    """Whether the model cannot be opened without the LLM."""
    return note["method"] == "laser" or find_method(note["method"]).loads_llm


def _base_model(note: dict[str, Any]) -> str | None:
    name = (note["backbone"] or {}).get("name", "")
    if name == DEFAULT_NAME:
        return ORIGINAL
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


# -- the text -----------------------------------------------------------------------------------------------------


def _what(note: dict[str, Any]) -> str:
    task = "A sequential recommender: from what a user bought before, in order, it ranks what comes next."
    if note["method"] != "laser":
        return (f"{task} Its method is {note['method']}.\n\nThis folder holds the weights and the catalogue (ids and "
                "texts of the items). It holds nobody's history.")
    config = note["config"]
    known = config["id_model"]["kind"] != IdModelKind.NONE
    held = "the adapter, the frozen ID model" if known else "the weights"
    if config["prompt"]["layout"] == Layout.NONE:
        more = ", and what a small transformer over them adds" if config.get("transformer", {}).get("blocks") else ""
        how = ("It compares vectors that a frozen language model made of the items' texts; a user is the weighted sum "
               f"of the history's items{more}. The language model reads new items alone.")
    else:
        carried = ", which carries what an ID-based recommender knows of the user," if known else ""
        how = (f"A frozen language model reads the items' texts between a trained prefix{carried} and a trained suffix "
               f"([Laser]({_PAPER})).")
    distilled = ("\n\nIt is distilled: in the language model's place, which reads new items alone, a small network "
                 "reads the history's item embeddings and the ID model's state." if "student" in note else "")
    return (f"{task} {how}\n\nThis folder holds {held} and the catalogue (ids, texts and embeddings of the items). It "
            f"holds neither the language model, which is named below, nor anybody's history.{distilled}")


def _data(note: dict[str, Any]) -> list[tuple[str, Any]]:
    data = note.get("data", {})
    sizes, settings = data.get("table1", {}), data.get("settings", {})
    later = note.get("n_items", 0) - note["n_known"]
    rows = [("data set", _card(note).get("data_name") or _NOT_STATED)]
    rows += [(label, f"{sizes[key]:,}") for key, label in (("users", "users"), ("items", "items"),
                                                           ("interactions", "interactions")) if key in sizes]
    if later > 0:
        rows.append(("items added after training", f"{later:,}"))
    if settings:
        rows += [("split", settings["split"]), ("interactions that a user and an item have at least",
                 f"{settings['min_user_interactions']} and {settings['min_item_interactions']}")]
    return [*rows, ("sha256 of the prepared data", data.get("sha256", _NOT_STATED))]


def _metrics(note: dict[str, Any]) -> str:
    rows = _rows(note)
    lines = ["## Results", ""]
    if not rows:
        return "\n".join([*lines, "None were recorded."])
    lines.append("The target's rank among all items, nothing filtered; ties take their mean rank.")
    for row in rows:
        measures = _measures(row)
        heads = ["split", *map(_title, measures), "users"]
        cells = [row["split"], *(f"{row[m]:.4f}" for m in measures), f"{row['users']:,}" if "users" in row else ""]
        lines += ["", _line(heads), _line(["---"] * len(heads)), _line(cells)]
        if row.get("data_sha256", note.get("data", {}).get("sha256")) != note.get("data", {}).get("sha256"):
            lines += ["", f"This row is of other data than the model was trained on (sha256 {row['data_sha256']})."]
    lines += ["", "The epoch was chosen on the validation split."]
    if not any(row["split"] == "test" for row in rows):
        lines[-1] += " No test results were recorded."
    return "\n".join(lines)


def _settings(note: dict[str, Any]) -> list[tuple[str, Any]]:
    tree = note["config"]
    if note["method"] != "laser":
        sections = find_method(note["method"]).sections
        own = [(section, key, value) for section in sections for key, value in tree[section].items()]
        return [("method", note["method"]), *((f"`{section}.{key}`", _told(section, key, value))
                                              for section, key, value in own)]
    names = ["prompt.layout", "prompt.template", "prompt.item_side", "prompt.max_items", "prompt.max_item_tokens",
             "mformer.prefix", "mformer.experts", "mformer.queries", "mformer.blocks", "mformer.d_model",
             "head.whiten_dims", "head.projection", "head.id_share", "head.seen_offset", "id_model.kind",
             "id_model.items", "train.stage_one_epochs", "train.stage_two_epochs", "train.lr", "train.batch_size",
             "train.temperature", "train.seed"]
    pairs = ((n, *n.split(".")) for n in names)
    return [(f"`{n}`", tree[section][key]) for n, section, key in pairs if key in tree.get(section, {})]


def _told(section: str, key: str, value: Any) -> Any:
    """Of folders on the author's machine, their names alone."""
    if value is None or key not in FOLDERS.get(section, ()):
        return value
    return ", ".join(Path(folder).name for folder in ([value] if isinstance(value, str) else value)) or None


def _parameters(note: dict[str, Any]) -> list[tuple[str, Any]]:
    training = note.get("training", {})
    if "trained_parameters" not in training:
        return [("trained", "not recorded")]
    rows = [("trained", f"{training['trained_parameters']:,}")]
    if "bi_tuning_parameters" in training:
        queries = note["config"]["mformer"]["queries"]
        rows = [("trained, all (prefix maker, suffix, head)", f"{training['trained_parameters']:,}"),
                (f"Bi-Tuning's share: a prefix of {queries} tokens and the suffix, as the LLM reads them",
                 f"{training['bi_tuning_parameters']:,}")]
    taught = training.get("teacher", {}).get("seconds")
    before = [] if taught is None else [("of the model that it was distilled from", f"{taught:,.0f}")]
    return [*rows, ("seconds of training", f"{training['seconds']:,.0f}"), *before]


def _backbone(note: dict[str, Any]) -> list[tuple[str, Any]]:
    named, settings = note["backbone"], note["config"]["backbone"]
    base, layers = _base_model(note), settings.get("layers")
    if named["name"] == DEFAULT_NAME:
        what = f"{DEFAULT_NAME}: {ORIGINAL} from a 4-bit GGUF, which laserrec fetches by itself"
    else:
        what = base or f"a local folder of the author's, {Path(named['name']).name}"
    known = base is not None and base.startswith("HuggingFaceTB/SmolLM2-")
    # Only the hub has revisions; other weights are told by their hash alone.
    revision = [("revision", named["revision"] or _NOT_STATED)] if base == named["name"] else []
    return [("name", what), *revision, ("sha256 of its weights, checked on loading", named["sha256"] or _NOT_STATED),
            ("layers used", layers or "all"), ("licence", LICENCE if known else f"{_NOT_STATED} here; see its page")]


def _usage(note: dict[str, Any], name: str, item_ids: list[str]) -> str:
    place = ', backbone="FOLDER-OF-THE-LLM"' if _needs_llm(note) and _base_model(note) is None else ""
    return "\n".join(["## Use", "", "```python", "from laserrec import LaserRecommender", "",
                      f'model = LaserRecommender.from_pretrained("{name}"{place})',
                      f"history = {item_ids!r}  # item ids, oldest first",
                      "print(model.recommend([history], k=5))", "```"])


def _licence(note: dict[str, Any]) -> str:
    licence = _card(note).get("licence") or _NOT_STATED
    own = " The language model has its own." if note["backbone"] else ""
    return f"## Licence\n\nOf what is in this folder: {licence}.{own}"


def _cite() -> str:
    return f"## Citation\n\n```bibtex\n{_CITATION}\n```"


def _table(title: str, rows: list[tuple[str, Any]]) -> str:
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *(_line(row) for row in rows)])


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _two_items(folder: Path, note: dict[str, Any]) -> list[str]:
    items = pl.read_parquet(folder / "items.parquet", columns=["item", "item_id"])
    return items.filter(~pl.col("item").is_in(note.get("removed", [])))["item_id"].head(2).to_list()
