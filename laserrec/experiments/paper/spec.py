"""What each table and figure of the paper compares, as named settings laid on a preset, with the published figures.

Published figures (Zhang et al. 2024, Tables 1 to 7) were measured on another split of the data and with an LLM of six
billion parameters. They stand beside ours to compare orders and ratios, never in one column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from laserrec.config import Config, merge
from laserrec.experiments.quality import closed_forms, id_settings
from laserrec.experiments.table import Row
from laserrec.methods.all import METHODS
from laserrec.presets import METHOD_SETTINGS, RIVAL_SIZES

LASER = "Laser"
Figures = tuple[float, float, float]
"""Recall@10, NDCG@10, MRR."""


@dataclass(frozen=True)
class Experiment:
    """One table or figure that ranks items. A row's settings are laid on the base preset."""

    name: str
    title: str
    rows: tuple[Row, ...]
    published: Mapping[str, Mapping[str, Figures]] = field(default_factory=dict)
    """Data set of the paper -> row -> figures."""
    split: str = "test"
    bases: tuple[str, ...] = ("paper-small", "bi-tuning")
    """Presets that it is run for."""


def _laser(name: str, **settings: dict[str, Any]) -> Row:
    return Row(name, "laser", "laser", settings)


def _rival(name: str, method: str, kind: str, seeded: bool = True, **settings: Any) -> Row:
    """With the method's own settings, whatever the base. How the LLM reads texts (its layers, the prompt) and how many
    users validate are the base's where these don't say it."""
    own = merge(METHOD_SETTINGS.get(method, {}), RIVAL_SIZES.get(method, {}))
    return Row(name, kind, method, merge(own, settings), seeded)


def _table2() -> tuple[Row, ...]:
    """The paper's nine rivals, as far as they are methods here, and two closed forms that it leaves out."""
    rivals = [_rival("SASRec", "sasrec", "id", **id_settings("sasrec")),
              _rival("BERT4Rec", "bert4rec", "id", **id_settings("bert4rec"))]
    others = {"RecGURU": ("recguru", "id"), "ZESRec": ("zesrec", "text"), "RECFORMER": ("recformer", "text"),
              "FDSA": ("fdsa", "text"), "LLM4REC": ("llm4rec", "text"), "KAR": ("kar", "text"),
              "LlamaRec": ("llamarec", "text")}
    rivals += [_rival(name, *kind) for name, kind in others.items() if kind[0] in METHODS]
    closed = (row for row in closed_forms() if row.method in ("ease", "ease-text"))
    return (*rivals, *closed, _laser(LASER))


_EXPERTS = ((8, 32), (4, 32), (12, 32), (8, 16), (8, 48))
"""K and L of Table 7; the base's own are scaled as 8 and 32 are."""


def table7_rows(experts: int, queries: int) -> tuple[Row, ...]:
    """K and L around the base's own, in the paper's proportions."""
    rows = []
    for k, length in _EXPERTS:
        own = {"experts": max(2, round(experts * k / 8)), "queries": max(1, round(queries * length / 32))}
        rows.append(_laser(f"K {own['experts']}, L {own['queries']} (paper: {k}, {length})", mformer=own))
    return tuple(rows)


_SCIENTIFIC = "Scientific"

EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "table2": lambda: Experiment("table2", "Laser and the rivals", _table2(), {
        _SCIENTIFIC: {"SASRec": (.1305, .0797, .0696), "BERT4Rec": (.1061, .0790, .0759),
                      "RecGURU": (.0781, .0575, .0566), "ZESRec": (.1260, .0843, .0745),
                      "RECFORMER": (.1114, .0722, .0650), "FDSA": (.0967, .0716, .0692),
                      "LLM4REC": (.1257, .0764, .0683), "KAR": (.1265, .0894, .0813),
                      "LlamaRec": (.1275, .0857, .0793), LASER: (.1396, .0970, .0893)}},
        bases=("paper-small", "small")),
    "table4": lambda: Experiment("table4", "Laser without its parts", (
        _laser(LASER),
        _laser("w/o MoE (one expert)", mformer={"prefix": "one_expert"}),
        _laser("w/o M-Former (one learned prefix)", mformer={"prefix": "learned"}),
        _laser("w/o prefix", mformer={"prefix": "none"}),
        _laser("w/o training stage 1", train={"stage_one_epochs": 0}),
        _laser("w/o training stage 2", train={"stage_two_epochs": 0})), {
        _SCIENTIFIC: {LASER: (.1396, .0970, .0893), "w/o MoE (one expert)": (.1261, .0889, .0795),
                      "w/o M-Former (one learned prefix)": (.1245, .0844, .0739), "w/o prefix": (.1128, .0705, .0619),
                      "w/o training stage 1": (.0784, .0544, .0509), "w/o training stage 2": (.1316, .0894, .0781)}}),
    "table5": lambda: Experiment("table5", "How an embedding is taken from the LLM", (
        _laser(LASER),
        _laser("average pooling", head={"pooling": "mean"}),
        _laser("[EOS], not trained", head={"pooling": "eos"})), {
        _SCIENTIFIC: {LASER: (.1396, .0970, .0893), "average pooling": (.0551, .0416, .0401),
                      "[EOS], not trained": (.0948, .0688, .0646)}}),
    "table6": lambda: Experiment("table6", "Wording of the prompt", (
        _laser(LASER),
        _laser('w/o "into a single token"', prompt={"template": "no_single_token"}),
        _laser("w/o the instruction", prompt={"template": "no_instruction"}),
        _laser("another instruction for items", prompt={"template": "item_instruction"})), {
        _SCIENTIFIC: {LASER: (.1396, .0970, .0893), 'w/o "into a single token"': (.1042, .0814, .0782),
                      "w/o the instruction": (.0985, .0747, .0652),
                      "another instruction for items": (.0972, .0635, .0567)}}),
    "table7": lambda: Experiment("table7", "Number of experts K and queries L", (), {
        _SCIENTIFIC: {f"(paper: {k}, {length})": figures for (k, length), figures in zip(_EXPERTS, (
            (.1661, .1199, .1112), (.1545, .1090, .0992), (.1560, .1138, .1054), (.1487, .1099, .1032),
            (.0975, .0692, .0644)), strict=True)}}, split="validation"),
    "figure4": lambda: Experiment("figure4", "Laser on other ID models", (
        _laser("Laser on BERT4Rec", **id_settings("bert4rec")),
        _laser("Laser on SASRec", **id_settings("sasrec")),
        _laser("Laser on GRU4Rec", **id_settings("gru4rec", **METHOD_SETTINGS["gru4rec"]["id_model"])),
        _laser("Laser on none", id_model={"kind": "none"}, head={"id_share": 0.0}),
        _rival("BERT4Rec", "bert4rec", "id", **id_settings("bert4rec")),
        _rival("SASRec", "sasrec", "id", **id_settings("sasrec")),
        _rival("GRU4Rec", "gru4rec", "id",
               **id_settings("gru4rec", **METHOD_SETTINGS["gru4rec"]["id_model"])))),
}
"""By name. Tables 1 and 3 count and train nothing: laserrec.experiments.paper.counts."""


def transferred() -> tuple[Row, ...]:
    """Figure 3's, which know items by their texts (laserrec.experiments.paper.transfer)."""
    return (_laser(LASER), _rival("RECFORMER", "recformer", "text"), _rival("ZESRec", "zesrec", "text"),
            Row("text SASRec", "text", "sasrec", id_settings("sasrec", items="text")))


_ITEM_TEXTS, _ONE_DOMAIN, _ON_ITS_OWN = "item texts", "one domain", "pre-trained on the same sequences"


def shown_name(row: Row, config: Config) -> str:
    """A row's name in the tables, with what its settings leave out of the published method. config: the row's."""
    if row.method == "kar" and config.kar.knowledge is None:
        return f"{row.name}, {_ITEM_TEXTS}"
    if row.method == "recguru" and config.recguru.other is None:
        return f"{row.name}, {_ONE_DOMAIN}"
    if row.method == "recformer" and not config.recformer.pretrain_on:
        return f"{row.name}, {_ON_ITS_OWN if config.recformer.pretrain_own else 'not pre-trained'}"
    return row.name


def published_of(experiment: Experiment, shown: str) -> dict[str, Figures]:
    """Data set of the paper -> its figures for the row of this name in the tables, where it gives any. Its RECFORMER is
    pre-trained: one that is not stands alone."""
    plain, _, without = shown.rpartition(", ")
    row = plain if without in (_ITEM_TEXTS, _ONE_DOMAIN, _ON_ITS_OWN) else shown
    return {data: figures for data, table in experiment.published.items()
            for name, figures in table.items() if row == name or (name.startswith("(") and row.endswith(name))}
