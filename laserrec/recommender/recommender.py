"""LaserRecommender: fit, recommend, encode, add items, save and load. The caller's own ids go in and come out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.config import BackboneConfig, Config, Precision, load_config
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories, read_histories
from laserrec.data.prepare import prepare
from laserrec.data.raw import ITEM_SCHEMA, from_frames, to_polars
from laserrec.evaluation.evaluate import Result
from laserrec.llm.backbone import Backbone, load_backbone, resolve_precision
from laserrec.llm.fetch import DEFAULT_NAME, fetch_default
from laserrec.llm.text_features import text_vectors
from laserrec.methods.id_store import load_id_model
from laserrec.methods.laser.encoder import Catalogue, Encoder
from laserrec.methods.laser.mformer import Route
from laserrec.methods.laser.model import Laser
from laserrec.methods.laser.new_items import lend_id_part, nearest_known
from laserrec.methods.laser.student import Student
from laserrec.methods.neighbours import check_size, weighed_sums
from laserrec.methods.sequence import IdModel
from laserrec.recommender.hub import local_folder, push_folder
from laserrec.recommender.model_folder import load_model, save_model
from laserrec.recommender.ranking import Ask, Ranked, best, ranked
from laserrec.recommender.results import with_result
from laserrec.retrieval.index import Index
from laserrec.retrieval.indexed import Indexed, attach
from laserrec.training.pretrain import pretrain_id_model
from laserrec.training.train import Fit, fit_fingerprint
from laserrec.util.distributed import World, alone, join
from laserrec.util.errors import UserError
from laserrec.util.memory import rows_at_once


class LaserRecommender:
    """A fitted model with its catalogue. Make one with `fit`, `fit_dataset`, `from_pretrained` or
    `laserrec.recommender.distil.distil`."""

    def __init__(self, encoder: Encoder, items: pl.DataFrame, embeddings: Float[Tensor, "n_items d_out"], facts: dict,
                 student: Student | None = None):
        self.encoder, self.items, self.facts, self.student = encoder, items, dict(facts), student
        self.embeddings = embeddings
        """Of unit length, so that a score is a product."""
        self._names: list[str] = items["item_id"].to_list()
        # Rows of removed items stay: an item's number is its row, and the ID model and the texts count on it.
        self._removed: list[int] = self.facts.pop("removed", [])
        gone = set(self._removed)
        self._index = {item_id: i for i, item_id in enumerate(self._names, 1) if i not in gone}
        self._indexed: Indexed | None = None
        self._lend_neighbours(embeddings)

    # -- make ---------------------------------------------------------------------------------------------------

    @classmethod
    def fit(cls, interactions: Any, items: Any, config: Config | None = None, folder: Path | str | None = None,
            columns: Mapping[str, str] | None = None, progress: bool = True) -> LaserRecommender:
        """Prepare, pretrain the ID model and fit Laser on polars or pandas frames.

        interactions: user_id, item_id, and timestamp or position (else row order); items: item_id, title, and brand,
        category if known. `columns` maps these names to yours. With `folder` all steps are kept there (data, id_model,
        model) and an interrupted fit is resumed by the same call. Raises UserError for bad input.
        """
        alone("LaserRecommender.fit")
        config = config or load_config()
        if folder is None:
            with tempfile.TemporaryDirectory(prefix="laserrec-") as scratch:
                return cls.fit(interactions, items, config, scratch, columns, progress)
        folder = Path(folder)
        raw = from_frames(interactions, items, columns)
        prepare(raw.interactions, raw.items, config.data, folder / "data", notes=raw.notes)
        dataset, backbone = Dataset.load(folder / "data"), load_backbone(config.backbone)
        pretrain_id_model(dataset, config.id_model, folder / "id_model", progress,
                          lambda: text_vectors(dataset, config, progress, backbone))
        id_model = load_id_model(folder / "id_model", dataset).model
        return cls.fit_dataset(dataset, id_model, config, folder / "model", progress, backbone)

    @classmethod
    def fit_dataset(cls, dataset: Dataset, id_model: IdModel, config: Config, folder: Path | str,
                    progress: bool = True, backbone: Backbone | None = None) -> LaserRecommender:
        """Fit on a data folder with a pretrained ID model, into a model folder. A finished folder of the same settings
        is loaded; an unfinished one is resumed. Raises UserError for a folder of other settings or data.

        Under torchrun all processes call this with the same arguments, fit together and get the same model; the
        first one writes the folder (docs/scaling.md)."""
        check_size(dataset.n_items, config.neighbours)
        folder, world = Path(folder), join()
        backbone = backbone or _same_backbone(config.backbone, world)
        fingerprint = fit_fingerprint(dataset.fingerprint, id_model, config)
        if world.told(lambda: fingerprint) != fingerprint:
            raise UserError(f"process {world.rank} of {world.size} has other data, settings or another ID model than "
                            "process 0; give every machine the same command and copies of the same folders")
        progress = progress and world.is_main
        if world.told((folder / "model.json").is_file):
            if not (folder / "model.json").is_file():
                raise UserError(f"process {world.rank} has no {folder}, which is finished where process 0 is; load it "
                                "there, in one process")
            return cls._finished(folder, fingerprint, backbone)
        torch.manual_seed(config.train.seed)
        laser = Laser(config, backbone, id_model.d_id, dataset.n_items)
        encoder = Encoder(laser, id_model, Catalogue(laser, dataset.items, dataset.n_items, progress, world))
        fit = Fit(encoder, dataset, config, folder, fingerprint, progress, world)
        log = fit.run()
        facts = {"fingerprint": fingerprint, "data": dataset.meta, "training": fit.summary()}
        model = cls(encoder, dataset.items, torch.nn.functional.normalize(fit.best_items, dim=-1), facts)
        if world.is_main:
            save_model(folder, model.encoder, model.items, model.embeddings, facts, log)
            fit.discard_checkpoint()
        world.wait()  # where the folder is shared, it is complete for all
        return model

    @classmethod
    def _finished(cls, folder: Path, fingerprint: str, backbone: Backbone) -> LaserRecommender:
        model = cls.from_pretrained(folder, backbone)
        # Not the one that was written then: a version may know settings of which the folder says nothing yet.
        own = fit_fingerprint(model.facts["data"]["sha256"], model.encoder.id_model, model.encoder.laser.config)
        if own != fingerprint or model.student is not None:
            raise UserError(f"{folder} holds a model with other settings, data or ID model; name another folder or "
                            "delete it")
        return model

    @classmethod
    def from_pretrained(cls, folder: Path | str, backbone: Backbone | Path | str | None = None,
                        revision: str | None = None, token: str | None = None) -> LaserRecommender:
        """Load a model folder, or ORG/NAME (also ORG/NAME@REVISION) from the Hugging Face Hub.

        backbone: the LLM, loaded or as a name or folder, in place of the one that the model names. revision: branch,
        tag or commit on the hub. token: else that of `hf auth login` or HF_TOKEN.
        Raises UserError if there is no such model, if a file of it has changed, or if the backbone's weights are not
        those it was trained with.
        """
        place = local_folder(folder, revision, token, own_backbone=isinstance(backbone, Backbone))
        return cls(*load_model(place, backbone))

    def save_pretrained(self, folder: Path | str, licence: str | None = None, data_name: str | None = None) -> None:
        """Write the adapter, the ID model, the catalogue with its embeddings, and a model card (README.md); the LLM is
        named, not copied. licence, data_name: for the card, which keeps what it was told before; "not stated" else."""
        told = {"licence": licence, "data_name": data_name}
        if told := {k: v for k, v in told.items() if v is not None}:
            self.facts["card"] = {**self.facts.get("card", {}), **told}
        removed = {"removed": self._removed} if self._removed else {}
        save_model(Path(folder), self.encoder, self.items, self.embeddings, {**self.facts, **removed}, None,
                   self.student)

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
            self.save_pretrained(scratch, licence, data_name)
            return push_folder(Path(scratch), repo_id, private, token, revision, commit_message)

    # -- use ----------------------------------------------------------------------------------------------------

    def recommend(self, histories: Any, k: int = 10, exclude_seen: bool = False,
                  candidates: Sequence[str] | None = None, unknown: str = "error") -> Any:
        """The k best next items of each history.

        histories: {user_id: [item_id, ...]} or [[item_id, ...], ...] (user_id is then the place, from 0), oldest
        first; or a frame with user_id and item_id, in time order within a user. Users need not be known.
        exclude_seen: leave out items of the history. candidates: recommend only these item ids. unknown: "error", or
        "drop" to leave out history items that are not in the catalogue.
        Returns a frame user_id, item_id, score (see `score`), rank (from 1): polars, or pandas if pandas went in.
        Raises UserError for an unknown item, an empty history, or k < 1.
        """
        if k < 1:
            raise UserError(f"k is {k}; it must be at least 1")
        asked = self._read(histories, unknown)
        allowed = None if candidates is None else self.dense_items(list(map(str, candidates)), "candidates")
        users, ids, scores, ranks = [], [], [], []
        size = self._users_at_once()
        for at in range(0, len(asked.rows), size):
            asks = [Ask(row, k, exclude_seen, allowed) for row in asked.rows[at : at + size]]
            for user, answer in zip(asked.users[at : at + size], self.rank(asks), strict=True):
                users += [user] * len(answer.items)
                ids += self.item_ids(answer.items)
                scores += answer.scores.tolist()
                ranks += range(1, len(answer.items) + 1)
        frame = pl.DataFrame({"user_id": users, "item_id": ids, "score": scores, "rank": ranks},
                             schema={"user_id": asked.user_type, "item_id": pl.String, "score": pl.Float32,
                                     "rank": pl.Int32})
        return frame.to_pandas() if asked.pandas else frame

    def encode_users(self, histories: Any, unknown: str = "error") -> np.ndarray:
        """Float32[users d_out], in the histories' order; compare with `encode_items` by cosine."""
        rows, size = self._read(histories, unknown).rows, self.encoder.laser.config.eval.batch_size
        if self.student is None:
            return self.encoder.encode(rows, size).numpy()
        return torch.cat([self._by_student(rows[at : at + size]) for at in range(0, len(rows), size)]).numpy()

    def encode_items(self, item_ids: Sequence[str] | None = None) -> np.ndarray:
        """Float32[items d_out], of unit length, of these items, or of the whole catalogue in the order of `items`."""
        if item_ids is None:
            return self.embeddings.numpy().copy()
        names = list(map(str, item_ids))
        self.dense_items(names, "item_ids")  # names what is unknown
        return self.embeddings[torch.tensor([self._index[i] - 1 for i in names], dtype=torch.long)].numpy()

    def add_items(self, frame: Any, embeddings: Float[Tensor, "new d_out"] | None = None) -> int:
        """Add items (item_id, title, and brand, category if known) to the catalogue and encode them; they can be
        recommended and stand in histories at once. Nothing is retrained: their text does the work, and where scores
        have an ID part, the items nearest by text lend them theirs. embeddings: these items' own, from an earlier call
        on the same model, which saves the encoding.
        Returns how many. Raises UserError for a missing title, a repeated or an existing id; then nothing is added."""
        new = self._checked_items(to_polars(frame))
        catalogue, size = self.encoder.catalogue, self.encoder.laser.config.eval.batch_size
        first = len(catalogue) + 1
        try:
            catalogue.add(new)
            if embeddings is None:
                embeddings = self._with_id_part(self.encoder.encode_items(size, first=first))
            joined = torch.cat([self.embeddings, torch.nn.functional.normalize(embeddings, dim=-1)])
            self._lend_neighbours(joined)
        except BaseException:
            catalogue.truncate(first - 1)
            raise
        new = new.with_columns(pl.Series("item", range(first, first + new.height), dtype=pl.Int32))
        self.items, self.embeddings = pl.concat([self.items, new.select(self.items.columns)]), joined
        ids = new["item_id"].to_list()
        self._names += ids
        self._index |= {item_id: first + i for i, item_id in enumerate(ids)}
        return new.height

    def remove_items(self, item_ids: Sequence[str]) -> int:
        """Take items out of the catalogue: they are never recommended again, and unknown in histories and candidates.
        Their rows stay in `items` and `embeddings`. The same id may be added anew, as an item of its own. Returns how
        many. Raises UserError for an unknown id; then nothing is removed."""
        names = list(dict.fromkeys(map(str, item_ids)))
        gone = self.dense_items(names, "remove_items").tolist()
        self._removed = [*self._removed, *gone]
        for name in names:
            del self._index[name]
        return len(names)

    def use_index(self, index: Index | Path | str | None) -> None:
        """Find recommendations through an index from here on: an index of all items under their dense numbers
        (`laserrec.retrieval.build.fill_index`), or a folder that `laserrec index build` made; None: compare with all
        items again. The index is not changed: items that are added or removed later are seen to beside it. An exact
        index changes no recommendation, others may miss some. Raises UserError for an index of another model or
        catalogue."""
        self._indexed = None if index is None else attach(index, self.embeddings, self.removed)

    @property
    def index(self) -> Index | None:
        """What `use_index` took."""
        return None if self._indexed is None else self._indexed.index

    @property
    def d_text(self) -> int:
        """Width of the embeddings' text part, which comes first."""
        return self.encoder.laser.head.d_text(self.embeddings.shape[1], self.encoder.id_model.d_id)

    def history_sums(self, histories: Sequence[np.ndarray]) -> Float[Tensor, "histories d_text"]:
        """The text parts of the histories' items, of unit length, summed, newer ones heavier (what a student reads)."""
        text, recency = self.embeddings[:, : self.d_text], self.encoder.laser.config.neighbours.recency
        return weighed_sums(histories, lambda items: text[items - 1], recency)

    def rank(self, asks: Sequence[Ask]) -> list[Ranked]:
        """Answers to requests in dense items, in one forward of the model: what `recommend` and the server build on.
        Memory grows with len(asks) x items; with an index, x items that were added since."""
        users, route = self._users([ask.history for ask in asks])
        return self._ranked(users, asks, [None] * len(asks) if route is None else route.expert.tolist())

    def nearest(self, item: int, k: int) -> Ranked:
        """The k items whose embeddings are nearest to one dense item's, which is not among them."""
        ask = Ask(np.array([item], dtype=np.int32), k, exclude_seen=True)
        return self._ranked(self.embeddings[item - 1 : item], [ask], [None])[0]

    @property
    def removed(self) -> frozenset[int]:
        """Dense items that were taken out of the catalogue."""
        return frozenset(self._removed)

    def dense_items(self, item_ids: Sequence[str], what: str) -> np.ndarray:
        """Int32[items] without repetition, in the order given. Raises UserError for unknown ids, as those of `what`."""
        if missing := self.unknown_items(item_ids):
            raise UserError(f"{what}: {len(missing)} unknown item ids, first {missing[:3]}; add them with add_items")
        return np.array([self._index[i] for i in dict.fromkeys(item_ids)], dtype=np.int32)

    def unknown_items(self, item_ids: Sequence[str]) -> list[str]:
        """Those that are not in the catalogue."""
        return [i for i in item_ids if i not in self._index]

    def item_ids(self, items: np.ndarray) -> list[str]:
        """Dense items -> the caller's ids."""
        return [self._names[i - 1] for i in items.tolist()]

    def score(self, histories: Sequence[np.ndarray]) -> Float[Tensor, "batch n_items"]:
        """Scores: dense items in, one column per item of the catalogue out; cosines, and the learnt offset of items
        that stand in the history if the model has one."""
        return self._scores(self._users(histories)[0], histories)

    # -- inside -------------------------------------------------------------------------------------------------

    def _with_id_part(self, new: Float[Tensor, "new d_out"]) -> Float[Tensor, "new d_out"]:
        if not self.encoder.laser.head.id_share:
            return new
        return lend_id_part(new, self.embeddings[: self.encoder.catalogue.n_known], self.encoder.id_model.d_id)

    def _lend_neighbours(self, embeddings: Float[Tensor, "n_items d_out"]) -> None:
        """Items behind the known ones take part in the neighbours' pull by the known items nearest by text."""
        laser, known = self.encoder.laser, self.encoder.catalogue.n_known
        if laser.neighbours is not None and len(embeddings) > known:
            text = embeddings[:, : self.d_text]
            laser.neighbours.lend(*nearest_known(text[known:], text[:known]))

    def _users(self, histories: Sequence[np.ndarray]) -> tuple[Float[Tensor, "batch d_out"], Route | None]:
        if self.student is not None:
            embeddings, route = self._by_student(histories), self.encoder.route(histories)
        else:
            embeddings, route = self.encoder.read(histories)
        return torch.nn.functional.normalize(embeddings, dim=-1), route

    @torch.no_grad()
    def _by_student(self, histories: Sequence[np.ndarray]) -> Float[Tensor, "batch d_out"]:
        """Users' embeddings without the LLM."""
        head, state = self.encoder.laser.head, self.encoder.id_part(histories)
        return head.joined(self.student(self.history_sums(histories), state), state if head.id_share else None)

    def _scores(self, users: Float[Tensor, "batch d_out"], histories: Sequence[np.ndarray]
                ) -> Float[Tensor, "batch n_items"]:
        return self.encoder.laser.finish(users @ self.embeddings.T, histories)

    def _ranked(self, users: Float[Tensor, "batch d_out"], asks: Sequence[Ask], experts: Sequence[int | None]
                ) -> list[Ranked]:
        if self._indexed is not None:
            laser = self.encoder.laser
            found = self._indexed.rank(users, asks, self.embeddings, self.removed, laser.pull, laser.finish_some)
            return [ranked(*pair, expert) for pair, expert in zip(found, experts, strict=True)]
        scores = self._scores(users, [ask.history for ask in asks])
        if self._removed:
            scores[:, torch.tensor(self._removed) - 1] = -torch.inf
        return [best(row, ask, expert) for row, ask, expert in zip(scores, asks, experts, strict=True)]

    def _users_at_once(self) -> int:
        """Users of one forward, as many as their scores' memory allows."""
        scored = len(self.embeddings) - (self._indexed.covered if self._indexed is not None else 0)
        return rows_at_once(scored, self.encoder.laser.config.eval.batch_size)

    def _read(self, histories: Any, unknown: str) -> Histories:
        return read_histories(histories, self._index, unknown)

    def _checked_items(self, frame: pl.DataFrame) -> pl.DataFrame:
        missing = [c for c in ("item_id", "title") if c not in frame.columns]
        if missing:
            raise UserError(f"new items: column {', '.join(missing)} is missing; there are: {', '.join(frame.columns)}")
        frame = frame.select(
            (pl.col(c) if c in frame.columns else pl.lit(None)).cast(pl.String).alias(c) for c in ITEM_SCHEMA)
        ids = frame["item_id"].to_list()
        known = [i for i in ids if i in self._index]
        if known:
            raise UserError(f"new items: {len(known)} ids are in the catalogue already, first {known[:3]}")
        if len(set(ids)) < len(ids) or None in ids:
            raise UserError("new items: an item_id is repeated or empty")
        untitled = frame.filter(pl.col("title").is_null() | (pl.col("title").str.strip_chars() == ""))
        if untitled.height:
            raise UserError(f"new items: {untitled.height} have no title, first {untitled['item_id'].to_list()[:3]}")
        return frame


def _same_backbone(config: BackboneConfig, world: World) -> Backbone:
    """The LLM in the same precision everywhere: machines, and even two processes of one, may measure differently."""
    if world.size == 1:
        return load_backbone(config)
    if config.name == DEFAULT_NAME:  # one download per machine, not one per process
        if os.environ.get("LOCAL_RANK", "0") == "0":
            fetch_default()
        world.wait()
    precision = Precision(world.told(lambda: resolve_precision(config.precision).value))
    return load_backbone(config.model_copy(update={"precision": precision}))
