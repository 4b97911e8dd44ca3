"""LaserRecommender: fit, recommend, encode, add items, save and load. The caller's own ids go in and come out."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laserrec.config import Config, load_config
from laserrec.data.clean import item_ids_of
from laserrec.data.dataset import Dataset
from laserrec.data.door import Asked, read_histories
from laserrec.data.histories import Histories
from laserrec.data.losses import LossWarning, two_of
from laserrec.data.prepare import prepare
from laserrec.data.raw import ITEM_SCHEMA, check_items, from_frames, read_items
from laserrec.data.summary import summary_lines
from laserrec.evaluation.evaluate import Result
from laserrec.llm.backbone import Backbone
from laserrec.methods.laser.model import Laser
from laserrec.methods.protocol import Growing, TwoTower
from laserrec.recommender import folder as folders
from laserrec.recommender.checks import changes_of, config_of, count_of, dataset_of, path_of, row_of, vectors_of
from laserrec.recommender.fitting import Fitted, fit, open_folder
from laserrec.recommender.hub import local_folder, push_folder
from laserrec.recommender.ranking import NOTHING, Ask, Ranked, best, ranked
from laserrec.recommender.refit import refit
from laserrec.recommender.results import with_result
from laserrec.recommender.turns import Turns
from laserrec.retrieval.index import Index
from laserrec.retrieval.indexed import Indexed, attach
from laserrec.util.device import choose
from laserrec.util.distributed import alone, join
from laserrec.util.errors import UserError
from laserrec.util.memory import rows_at_once


class LaserRecommender:
    """A fitted model of any method with its catalogue. Make one with `fit`, `fit_dataset` or `from_pretrained`.

    It may be used from several threads: calls wait for each other. A forked process may ask it with lists and dicts, on
    the CPU, and gets its answers from one thread of torch; anything else is refused there. Start processes with the
    method spawn, or load the model in them, to do more.
    """

    def __init__(self, fitted: Fitted):
        self.fitted, self.facts = fitted, dict(fitted.facts)
        self.items = fitted.items
        self._held = Turns(lambda: fitted.features.device).held
        self._names: list[str] = self.items["item_id"].to_list()
        # Rows of removed items stay: an item's number is its row, and the model counts on it.
        self._removed: list[int] = self.facts.pop("removed", [])
        gone = set(self._removed)
        self._rows = {name: row for row, name in enumerate(self._names) if row not in gone}
        self._indexed: Indexed | None = None

    # -- make ---------------------------------------------------------------------------------------------------

    @classmethod
    def fit(cls, interactions: Any, items: Any = None, config: Config | None = None, folder: Path | str | None = None,
            columns: Mapping[str, str] | None = None, progress: bool = True, method: str = "laser",
            device: str = "auto", vectors: Any = None) -> LaserRecommender:
        """Prepare polars or pandas frames and fit a method on them.

        interactions: user_id, item_id, and timestamp or position (else row order); items: item_id, title, and brand,
        category and what else config.prompt.attributes names; None: the interactions' own columns of these names, and
        no text where there are none. `columns` maps these names to yours. vectors: a frame of item_id and vector, the
        items' own vectors (see config.backbone.item_vectors). With `folder` all steps are kept there (data, model), and
        the same call resumes an interrupted fit. device: auto, cpu, cuda, cuda:N or mps. UserError for bad input.
        """
        alone("LaserRecommender.fit")
        config = load_config() if config is None else config_of(config)
        if folder is None:
            with tempfile.TemporaryDirectory(prefix="laserrec-") as scratch:
                return cls.fit(interactions, items, config, scratch, columns, progress, method, device, vectors)
        folder = Path(folder)
        more = dict.fromkeys((*config.data.item_columns, *config.prompt.attributes))
        data = config.data.model_copy(update={"item_columns": tuple(n for n in more if n not in ITEM_SCHEMA)})
        raw = from_frames(interactions, items, columns, extra=data.item_columns, vectors=vectors)
        report = prepare(raw.interactions, raw.items, data, folder / "data", notes=raw.notes)
        if progress:
            print(*summary_lines(report), sep="\n", file=sys.stderr)
        return cls.fit_dataset(Dataset.load(folder / "data"), config, folder / "model", method, device=device,
                               progress=progress)

    @classmethod
    def fit_dataset(cls, dataset: Dataset | Path | str, config: Config, folder: Path | str, method: str = "laser",
                    id_model: Path | str | None = None, device: str = "auto", progress: bool = True,
                    trust_remote_code: bool = False) -> LaserRecommender:
        """Fit on a data folder, into a model folder; see `laserrec.recommender.fitting.fit`. The data folder's items
        without enough interactions are added at the end, where the method can take them (`dataset.new_items`)."""
        dataset = dataset_of(dataset)
        model = cls(fit(method, dataset, config_of(config), folder, choose(device), id_model, progress=progress,
                        trust_remote_code=trust_remote_code))
        if model._grown(dataset.new_items) and join().is_main:
            model.save_pretrained(folder)
        return model

    def _grown(self, items: pl.DataFrame) -> int:
        """Add those that never were in the catalogue, if the method can; how many."""
        new = items.filter(~pl.col("item_id").is_in(self._names))  # what was removed since stays so
        return self.add_cleaned(new) if new.height and isinstance(self.model, Growing) else 0

    def refit(self, dataset: Dataset | Path | str, folder: Path | str, changes: Mapping[str, Any] | None = None,
              progress: bool = True) -> LaserRecommender:
        """A new model of the same method for newer data, in a model folder of its own; this one stays as it is.

        dataset: a data folder of all interactions that there are now, old and new, with the items known by their
        item_id. Training starts from this model's weights and is short (laserrec.recommender.refit); new items start
        near those of similar text. What this model was before training is kept where training does not help on
        validation. Closed forms, and methods that can't carry their weights over (lrurec, llamarec, llm4rec, fdsa, kar,
        recguru), are fitted from nothing, as `fit_dataset` does. Items that were added to this model stay, and removed
        ones are gone. The card keeps what it was told.
        changes: settings to change, as {"train": {"stage_one_epochs": 2}}.
        An interrupted call is resumed by the same call, a finished folder loaded. Raises UserError for data without any
        known item if items are told by ids alone, for settings that would change the weights' shapes, as `fit_dataset`.
        """
        alone("refitting")
        dataset = dataset_of(dataset)
        model = LaserRecommender(refit(self.fitted, dataset, folder, changes_of(changes), progress))
        gone = [name for name in map(self._names.__getitem__, self._removed) if name not in self._rows]
        there = model.items.schema
        added = self.items[self.n_known :].filter(~pl.col("item").is_in(self._removed)).drop("item")
        added = added.select(name for name, kind in added.schema.items() if there.get(name) == kind)
        new = pl.concat([dataset.new_items, added], how="diagonal").filter(~pl.col("item_id").is_in(gone))
        new = new.unique("item_id", keep="first", maintain_order=True)
        grown = model._grown(new)
        if gone := [name for name in gone if not model.unknown_items([name])]:
            model.remove_items(gone)
        if grown or gone:
            model.save_pretrained(folder)
        return model

    @classmethod
    def from_pretrained(cls, folder: Path | str, backbone: Backbone | Path | str | None = None,
                        revision: str | None = None, token: str | None = None, device: str = "auto",
                        trust_remote_code: bool = False) -> LaserRecommender:
        """Load a model folder, or ORG/NAME (also ORG/NAME@REVISION) from the Hugging Face Hub.

        backbone: the LLM, loaded or as a name or folder, in place of the one that the model names. revision: branch,
        tag or commit on the hub. token: else that of `hf auth login` or HF_TOKEN. trust_remote_code: let an LLM run
        Python code that is shipped with its weights; nothing in the folder can allow that.
        Raises UserError if there is no such model, if a file of it has changed, or if the LLM's weights are not those
        it was fitted with.
        """
        where = backbone.device if isinstance(backbone, Backbone) else choose(device)
        place = local_folder(path_of(folder, "folder", "a model folder, or ORG/NAME on the hub"), revision, token)
        return cls(open_folder(place, where, backbone, trust_remote_code=trust_remote_code))

    def save_pretrained(self, folder: Path | str, licence: str | None = None, data_name: str | None = None) -> None:
        """Write weights, catalogue and a model card (README.md); the LLM is named, not copied. licence, data_name: for
        the card, which keeps what it was told before; "not stated" else. Raises UserError where the folder can't be
        written, or holds something else than a model."""
        told = {"licence": licence, "data_name": data_name}
        if told := {k: v for k, v in told.items() if v is not None}:
            self.facts["card"] = {**self.facts.get("card", {}), **told}
        with self._held(tables=True):
            folders.save(Path(folder), self.saved())

    def saved(self) -> folders.Saved:
        """All that a model folder holds."""
        facts = {**self.facts, **({"removed": self._removed} if self._removed else {})}
        return replace(self.fitted.saved(), items=self.items, facts=facts)

    def record(self, result: Result, dataset: Dataset) -> None:
        """Keep what `laserrec.evaluation.evaluate` measured of this model, for the card of its next save or push."""
        self.facts["results"] = with_result(self.facts.get("results", []), result, dataset)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None,
                    revision: str | None = None, commit_message: str | None = None, licence: str | None = None,
                    data_name: str | None = None) -> str:
        """`save_pretrained` to ORG/NAME on the Hugging Face Hub, in one commit; returns its address. The repository is
        made if it isn't there (private: as what), the branch `revision` too. token: else that of `hf auth login` or
        HF_TOKEN. Where the LLM is a local folder, its path is in model.json, and who loads the model brings the LLM.
        Raises UserError for what the hub refuses and without a network."""
        with tempfile.TemporaryDirectory(prefix="laserrec-") as scratch:
            self.save_pretrained(Path(scratch) / "model", licence, data_name)
            return push_folder(Path(scratch) / "model", repo_id, private, token, revision, commit_message)

    # -- use ----------------------------------------------------------------------------------------------------

    def recommend(self, histories: Any, k: int = 10, exclude_seen: bool = False,
                  candidates: Sequence[str] | None = None, unknown: str = "error",
                  exclude: Sequence[str] | Mapping[Any, Sequence[str]] | None = None) -> Any:
        """The k best next items of each history.

        histories: {user_id: [item_id, ...]} or [[item_id, ...], ...] (user_id is then the place, from 0), oldest
        first; or a frame with user_id and item_id. Users need not be known. exclude_seen: leave out items of the
        history. candidates: recommend only these item ids. exclude: never recommend these, or {user_id: these}.
        unknown: "error", or "drop" to leave out history items that are not in the catalogue; a user without any other
        gets no recommendation. Users for whom nothing is left are counted in a LossWarning.
        Returns a frame user_id, item_id, score, rank (from 1): polars, or pandas if pandas went in.
        Raises UserError for an unknown item, an empty history, or k < 1.
        """
        k = count_of(k, "k")
        asked = self._read(histories, unknown, exclude)
        allowed = None if candidates is None else self.dense_items(item_ids_of(candidates), "candidates")
        users, ids, scores, ranks, nothing = [], [], [], [], 0
        size = self._users_at_once()
        for at in range(0, len(asked.rows), size):
            part = zip(asked.rows[at : at + size], asked.excluded[at : at + size], strict=True)
            asks = [Ask(np.array(row, dtype=np.int64), k, exclude_seen, allowed, np.array(hidden, dtype=np.int64))
                    for row, hidden in part]
            for user, answer in zip(asked.users[at : at + size], self.rank(asks), strict=True):
                nothing += not len(answer.items)
                users += [user] * len(answer.items)
                ids += self.item_ids(answer.items)
                scores += answer.scores.tolist()
                ranks += range(1, len(answer.items) + 1)
        asked.lost.tell_unanswered(nothing)
        frame = pl.DataFrame({"user_id": users, "item_id": ids, "score": scores, "rank": ranks},
                             schema={"user_id": asked.user_type, "item_id": pl.String, "score": pl.Float32,
                                     "rank": pl.Int32})
        return frame.to_pandas() if asked.pandas else frame

    def encode_users(self, histories: Any, unknown: str = "error") -> Float[np.ndarray, "users d_out"]:
        """Users' vectors in the histories' order: a score is the product with `encode_items`, then the model's terms.
        Raises UserError where the method has no such vectors."""
        asked = Histories.of(self._read(histories, unknown).rows)
        with self._held():
            parts = torch.arange(len(asked)).split(self.batch_size)
            return torch.cat([self._towers().users(asked.take(rows)) for rows in parts]).detach().cpu().numpy()

    def encode_items(self, item_ids: Sequence[str] | None = None) -> Float[np.ndarray, "items d_out"]:
        """Items' vectors, of these or of the whole catalogue in the order of `items`."""
        if item_ids is None:
            return self.embeddings.cpu().numpy().copy()
        names = item_ids_of(item_ids)
        self.dense_items(names, "item_ids")  # names what is unknown
        return self.embeddings[torch.tensor([self._rows[i] for i in names], dtype=torch.long)].cpu().numpy()

    def add_items(self, frame: Any, embeddings: Float[np.ndarray | Tensor, "new d_out"] | None = None,
                  exists: str = "error") -> int:
        """Add items (item_id, title; brand, category, further columns and vector of the catalogue if known) to the
        catalogue and encode them; they can be recommended and stand in histories at once. Nothing is retrained: their
        text does the work, and where scores have an ID part, they inherit that of the items nearest by text.
        embeddings: these items' own, as `encode_items` gave them on the same model, which saves making them; where
        items stand in histories by the means of their texts (prompt.item_side mean), the LLM reads these all the same.
        exists: "error", or "skip" to leave out items that are in the catalogue already.
        Returns how many. Items of which the model reads nothing are counted in a LossWarning. Raises UserError for a
        missing title, a repeated or an existing id, embeddings that are not finite or not one for each, and for a
        method without `laserrec.methods.protocol.Growing`; then nothing is added."""
        with self._held(tables=True):
            return self._appended(self._new_items(frame, exists), embeddings)

    def add_cleaned(self, items: pl.DataFrame, embeddings: Float[np.ndarray | Tensor, "new d_out"] | None = None,
                    means: Float[Tensor, "new d_means"] | None = None) -> int:
        """As `add_items`, of items whose texts were cleaned when they were read, such as those of another catalogue.
        They are taken as they are: a text that is cleaned once more may become another ("&amp;amp;"). means: their rows
        of `means` on the same model; with `embeddings` too, no text is read."""
        with self._held(tables=True):
            columns = {name: kind for name, kind in self.items.schema.items() if name != "item"}
            new = items.select(pl.col(name) if name in items.columns else pl.lit(None, kind).alias(name)
                               for name, kind in columns.items())
            return self._appended(self._without_known(check_items(new), "error"), embeddings, means)

    def _appended(self, new: pl.DataFrame, embeddings: Float[np.ndarray | Tensor, "new d_out"] | None,
                  means: Float[Tensor, "new d_means"] | None = None) -> int:
        if not isinstance(self.model, Growing):
            raise UserError(f"method {self.method} can't take items that it was not fitted on; fit it again with "
                            "them, or use laser")
        first, ids = len(self._names), new["item_id"].to_list()
        if not ids:
            return 0
        self.model.add_items(new, None if embeddings is None else vectors_of(embeddings, ids, self.embeddings), means)
        new = new.with_columns(pl.Series("item", range(first, first + new.height), dtype=pl.Int32))
        self.items = pl.concat([self.items, new.select(self.items.columns)])
        self._names += ids
        self._rows |= {name: first + i for i, name in enumerate(ids)}
        self._tell_blank(first)
        return new.height

    def _tell_blank(self, first: int) -> None:
        """Of items from this row on."""
        if not isinstance(self.model, TwoTower):
            return
        if blank := int((~self.embeddings[first:].any(dim=1)).sum()):
            warnings.warn(f"add_items: of {blank:,} of {len(self._names) - first:,} items there is nothing that this "
                          "model reads (a text, or a vector of their own), so it will hardly recommend them. Refit it "
                          "when they have interactions", LossWarning, stacklevel=4)

    def remove_items(self, item_ids: Sequence[str]) -> int:
        """Take items out of the catalogue: they are never recommended again, and unknown in histories and candidates.
        Their rows stay in `items` and `embeddings`. The same id may be added anew, as an item of its own. Returns how
        many. Raises UserError for an unknown id; then nothing is removed."""
        with self._held():
            names = list(dict.fromkeys(item_ids_of(item_ids)))
            if missing := self.unknown_items(names):
                raise UserError(f"remove_items: {len(missing)} unknown item ids, first {missing[:3]}; the catalogue's "
                                f"are like {two_of(self._rows)}. Nothing was removed; leave them out")
            self._removed = [*self._removed, *self.dense_items(names, "remove_items").tolist()]
            for name in names:
                del self._rows[name]
            return len(names)

    def use_index(self, index: Index | Path | str | None) -> None:
        """Find recommendations through an index from here on: an index of all items under their rows
        (`laserrec.recommender.indexing.fill_index`), or a folder that `laserrec index build` made; None: compare with
        all items again. The index is not changed: items that are added or removed later are seen to beside it. An exact
        index changes no recommendation, but where a network ranks items anew (`blend.network`), which then looks at the
        best 500 by vectors; other indexes may miss some. Raises UserError for an index of another model or
        catalogue."""
        with self._held():
            self._indexed = None if index is None else attach(index, self.embeddings, self.removed)

    @property
    def index(self) -> Index | None:
        """What `use_index` took."""
        return None if self._indexed is None else self._indexed.index

    def rank(self, asks: Sequence[Ask]) -> list[Ranked]:
        """Answers to requests in item rows, in one forward of the model: what `recommend` and the server build on.
        Memory grows with len(asks) x items; with an index, x items that were added since."""
        some = [ask for ask in asks if len(ask.history)]
        with self._held():
            answers = iter(self._rank(some) if some else [])
        return [next(answers) if len(ask.history) else NOTHING for ask in asks]

    def nearest(self, row: int, k: int) -> Ranked:
        """The k items whose vectors have the largest cosine with one item's, which is not among them. Vectors alone:
        no other part of a score. Raises UserError for a row that is not in `items`, and k < 1."""
        row, k = row_of(row, len(self._names)), count_of(k, "k")
        with self._held():
            unit = F.normalize(self.embeddings, dim=-1)
            scores = unit @ unit[row]
            scores[torch.tensor([row, *self._removed], device=scores.device)] = -torch.inf
            return best(scores, Ask(np.zeros(0, np.int64), k), None)

    @torch.no_grad()
    def score(self, histories: Histories) -> Float[Tensor, "users n_items"]:
        """Scores of all items of the catalogue, one column per row of `items`."""
        with self._held():
            return self.model.score(histories)

    # -- what stands in it --------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The method's own model, in item rows."""
        return self.fitted.model

    @property
    def method(self) -> str:
        """Its name in laserrec.methods.all.METHODS."""
        return self.fitted.method

    @property
    def config(self) -> Config:
        """The settings it was fitted with."""
        return self.fitted.config

    @property
    def batch_size(self) -> int:
        """Users that go through the model together."""
        return self.config.eval.batch_size

    @property
    def n_known(self) -> int:
        """Items that the model was fitted on; later rows were added."""
        return self.fitted.n_known

    @property
    def embeddings(self) -> Float[Tensor, "n_items d_out"]:
        """Items' vectors, one row per row of `items`. Raises UserError where the method has none."""
        return self._towers().items().detach()

    @property
    def means(self) -> Float[Tensor, "n_items d_means"] | None:
        """What the LLM made of the items' texts, one row per row of `items`; None where the model keeps no such."""
        return getattr(self.model, "item_tensors", dict)().get("means")

    @property
    def rows(self) -> Mapping[str, int]:
        """Item id -> row, of the items that can be recommended."""
        return self._rows

    @property
    def removed(self) -> frozenset[int]:
        """Rows of items that were taken out of the catalogue."""
        return frozenset(self._removed)

    def dense_items(self, item_ids: Sequence[str], what: str) -> np.ndarray:
        """Int64[items] rows without repetition, in the order given. Raises UserError for unknown ids, as those of
        `what`."""
        if missing := self.unknown_items(item_ids):
            raise UserError(f"{what}: {len(missing)} unknown item ids, first {missing[:3]}; add them with add_items")
        return np.array([self._rows[i] for i in dict.fromkeys(item_ids)], dtype=np.int64)

    def unknown_items(self, item_ids: Sequence[str]) -> list[str]:
        """Those that are not in the catalogue."""
        return [i for i in item_ids if i not in self._rows]

    def item_ids(self, rows: np.ndarray) -> list[str]:
        """Item rows -> the caller's ids."""
        return [self._names[row] for row in rows.tolist()]

    # -- inside -------------------------------------------------------------------------------------------------

    def _towers(self) -> TwoTower:
        if not isinstance(self.model, TwoTower):
            raise UserError(f"method {self.method} has no vectors of users and items; recommend and evaluate take it, "
                            "an index, similar items and encoding do not")
        return self.model

    @torch.no_grad()
    def _rank(self, asks: Sequence[Ask]) -> list[Ranked]:
        histories, route = Histories.of([ask.history for ask in asks]), None
        if isinstance(self.model, TwoTower):
            users, route = (self.model.read(histories) if isinstance(self.model, Laser)
                            else (self.model.users(histories), None))
        experts = [None] * len(asks) if route is None else route.expert.tolist()
        if self._indexed is not None:
            terms = [term.on(histories, users) for term in self.model.terms]
            found = self._indexed.rank(users, asks, self.embeddings, self.removed, terms, self.model.depth)
            return [ranked(*pair, expert) for pair, expert in zip(found, experts, strict=True)]
        if isinstance(self.model, TwoTower):
            scores = users @ self.model.items().T
            for term in self.model.terms:
                scores = term.on(histories, users).to_all(scores)
        else:
            scores = self.model.score(histories)
        scores[:, torch.tensor(self._removed, dtype=torch.long, device=scores.device)] = -torch.inf
        return [best(row, ask, expert) for row, ask, expert in zip(scores, asks, experts, strict=True)]

    def _users_at_once(self) -> int:
        """Users of one forward, as many as their scores' memory allows."""
        scored = len(self._names) - (self._indexed.covered if self._indexed is not None else 0)
        return rows_at_once(scored, self.batch_size)

    def _read(self, histories: Any, unknown: str, exclude: Any = None) -> Asked:
        if not isinstance(histories, Mapping | list | tuple | np.ndarray):
            with self._held(tables=True):
                pass  # refuses it in a forked process
        return read_histories(histories, self._rows, unknown, exclude)

    def _new_items(self, frame: Any, exists: str) -> pl.DataFrame:
        """Cleaned, without those that are in the catalogue already."""
        if exists not in ("error", "skip"):
            raise UserError(f'exists is "error" or "skip", not {exists!r}')
        return self._without_known(read_items(frame, catalogue=self.items), exists)

    def _without_known(self, items: pl.DataFrame, exists: str) -> pl.DataFrame:
        known = [i for i in items["item_id"].to_list() if i in self._rows]
        if known and exists == "error":
            raise UserError(f"new items: {len(known)} ids are in the catalogue already, first {known[:3]}; leave them "
                            'out, or give exists="skip"')
        return items.filter(~pl.col("item_id").is_in(known))
