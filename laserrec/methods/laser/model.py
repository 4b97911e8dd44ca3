"""Laser as a composition: a user side, an item side, the ID part beside them, and terms behind the cosine."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.config import Config, Prefix
from laserrec.data.histories import Histories
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.laser.head import AddedOutput, Head
from laserrec.methods.laser.id_states import IdStates
from laserrec.methods.laser.mformer import Route
from laserrec.methods.laser.new_items import inherit_id_part, nearest_known
from laserrec.methods.laser.ranker import AppliedRanker, Newest, Ranker
from laserrec.methods.laser.readers import Reader
from laserrec.methods.laser.sides import ItemSide, MeanItems, StudentUsers, UserSide
from laserrec.methods.laser.student import Student
from laserrec.methods.laser.texts import Texts
from laserrec.methods.laser.transformer import HistoryTransformer
from laserrec.methods.neighbours import Neighbours
from laserrec.methods.protocol import ScoreTerm, TwoTower
from laserrec.methods.terms import AtPairs, SeenOffset
from laserrec.util.errors import UserError
from laserrec.util.room import Room

_ITEMS_AT_ONCE = 64
"""Items whose texts go through the LLM together."""
_RANKED = 500
"""Best items by vectors that are looked at for the ranker where an index finds them."""


class Laser(nn.Module, TwoTower):
    """A two-tower model whose scores are cosines, changed by its terms.

    An embedding is the text part and, with head.id_share, the ID part behind it: with both of unit length and scaled by
    the roots of their shares, the cosine of two embeddings is the shares' weighted sum of the parts' cosines. A part
    that is None is not there.
    """

    def __init__(
        self, config: Config, user_side: UserSide, item_side: ItemSide, head: Head, ids: IdStates,
        features: TextFeatures, texts: Texts | None = None, reader: Reader | None = None,
        added: AddedOutput | None = None, transformer: HistoryTransformer | None = None,
        student: Student | None = None, neighbours: Neighbours | None = None, seen: SeenOffset | None = None,
    ):
        super().__init__()
        self.config, self.user_side, self.item_side = config, user_side, item_side
        self.ids, self.features, self.texts = ids, features, texts
        self.head, self.reader, self.added, self.student = head, reader, added, student
        self.transformer, self.neighbours, self.seen = transformer, neighbours, seen
        self.ranker: Ranker | None = None
        self.id_share = config.head.id_share
        tau = torch.tensor(float(config.train.temperature))
        self.log_temperature = nn.Parameter(tau.log()) if config.train.learn_temperature else None
        self.to(features.device)
        self.vectors: Float[Tensor, "n_items d_out"] = torch.zeros(0, self.d_out, device=self.device)
        """The items', of unit length."""
        self._room = Room()
        self.n_known = 0
        """Items that were there when the model was fitted; later ones have text alone."""
        self.carried: Float[Tensor, "n_items d_text"] | None = None
        """Where its weights are an earlier fit's, whose whitening is then kept: that fit's text parts of the items, of
        unit length, NaN for items that it did not know. After its second stage they are not what its head makes."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.features.device

    @property
    def d_text(self) -> int:
        """Width of the embeddings' text part, which comes first."""
        return self.head.d_out

    @property
    def d_out(self) -> int:
        """Width of the embeddings."""
        return self.d_text + (self.ids.d_part if self.id_share else 0)

    @property
    def terms(self) -> Sequence[ScoreTerm]:
        """Neighbours change cosines, the seen offset what comes of them; a ranker, if there is one, does both and what
        it has learnt."""
        if self.ranker is not None:
            return [_Ranking(self, self.ranker)]
        return [term for term in (self.neighbours, self.seen) if term is not None]

    @property
    def depth(self) -> int:
        """As `TwoTower.depth`."""
        return 0 if self.ranker is None else _RANKED

    @property
    def temperature(self) -> float | Float[Tensor, ""]:
        """Of the loss's softmax [tau]; with gradient if it is learnt (train.learn_temperature)."""
        return self.config.train.temperature if self.log_temperature is None else self.log_temperature.exp()

    # -- users and items ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, histories: Histories) -> tuple[Float[Tensor, "users d_out"], Route | None]:
        """Users' embeddings, of unit length, and how their prefixes were routed."""
        text, route = self.user_side.text(histories)
        return self._joined(text, self.ids.user_part(histories) if self.id_share else None), route

    def users(self, histories: Histories) -> Float[Tensor, "users d_out"]:
        """Users' embeddings, of unit length."""
        return self.read(histories)[0]

    @torch.no_grad()
    def newest(self, histories: Histories) -> Newest:
        """The histories' newest items, for the ranker."""
        last = histories.to(self.device).last(1)
        vectors = self.vectors.new_zeros(len(last), self.vectors.shape[1])
        vectors[last.users] = self.vectors[last.items]
        return Newest(vectors, None if self.neighbours is None else self.neighbours.on(last))

    def items(self, rows: Int[Tensor, "some"] | None = None) -> Float[Tensor, "items d_out"]:
        """Items' embeddings, of unit length."""
        return self.vectors if rows is None else self.vectors[rows]

    @torch.no_grad()
    def item_outputs(self, rows: Int[Tensor, "items"]) -> Float[Tensor, "items d_in"]:
        """What the item side puts into the head."""
        parts = [self.item_side.outputs(part) for part in rows.split(_ITEMS_AT_ONCE)]
        return torch.cat(parts) if parts else torch.zeros(0, self.head.d_out, device=self.device)

    @torch.no_grad()
    def embed_items(self, outputs: Float[Tensor, "items d_in"], rows: Int[Tensor, "items"],
                    parents: Float[Tensor, "parents d_out"] | None = None) -> Float[Tensor, "items d_out"]:
        """Embeddings of items from their outputs. Where they have an ID part, items that the ID model does not know
        inherit theirs from the `parents` nearest by text. parents: embeddings of items that it knows; None: those
        among `rows`."""
        return self._with_ids(self.head(outputs), rows, parents)

    def _with_ids(self, text: Float[Tensor, "items d_text"], rows: Int[Tensor, "items"],
                  parents: Float[Tensor, "parents d_out"] | None = None) -> Float[Tensor, "items d_out"]:
        if not self.id_share:
            return self._joined(text, None)
        vectors, known = self._joined(text, self.ids.item_part(rows)), self.ids.knows(rows)
        parents = vectors[known] if parents is None else parents
        if len(parents) and not known.all():
            vectors[~known] = F.normalize(inherit_id_part(vectors[~known], parents, self.ids.d_part), dim=-1)
        return vectors

    @torch.no_grad()
    def set_id_share(self, share: float) -> None:
        """Weigh the ID part of all embeddings anew."""
        text, rows = self.vectors[:, : self.d_text], torch.arange(len(self.vectors), device=self.device)
        self.id_share = share
        self.set_items(self._with_ids(text, rows))

    @torch.no_grad()
    def set_text(self, text: Float[Tensor, "n_items d_text"]) -> None:
        """Take these as the text part of the items' embeddings."""
        self.set_items(self._with_ids(text, torch.arange(len(text), device=self.device)))

    def set_items(self, vectors: Float[Tensor, "n_items d_out"]) -> None:
        """Take these as the items' embeddings."""
        self.vectors, text = vectors, vectors[:, : self.d_text]
        if isinstance(self.user_side, StudentUsers):
            self.user_side.vectors = F.normalize(text, dim=-1)
        if (inheriting := self._inheriting()) and self.n_known > 0:
            parents = nearest_known(text[self.n_known :], text[: self.n_known])
            for part in inheriting:
                part.inherit(*parents)

    @torch.no_grad()
    def scale_neighbours(self, some_users: Histories) -> None:
        """Set the neighbours' scale by these users' cosines with the items that the model was fitted on."""
        if self.neighbours is None or not len(some_users):
            return
        rows = torch.arange(len(some_users)).split(self.config.eval.batch_size)
        users = torch.cat([self.users(some_users.take(part)) for part in rows])
        self.neighbours.scale_to(users @ self.vectors[: self.n_known].T)

    def _joined(self, text: Float[Tensor, "some d_text"], id_part: Float[Tensor, "some d_id"] | None
                ) -> Float[Tensor, "some d_out"]:
        if id_part is None:
            return F.normalize(text, dim=-1)
        shares = (1 - self.id_share) ** 0.5, self.id_share**0.5
        parts = [share * F.normalize(part, dim=-1) for share, part in zip(shares, (text, id_part), strict=True)]
        return F.normalize(torch.cat(parts, dim=-1), dim=-1)

    def sizes(self) -> dict[str, int]:
        """bi_tuning_parameters: prefix and suffix as the LLM reads them (paper, Table 3), if it reads histories."""
        if self.reader is None:
            return {}
        queries = 0 if self.config.mformer.prefix == Prefix.NONE else self.config.mformer.queries
        return {"bi_tuning_parameters": (queries + 1) * self.reader.suffix.shape[1]}

    # -- new items ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_items(self, items: pl.DataFrame, vectors: Float[Tensor, "new d_out"] | None = None,
                  means: Float[Tensor, "new d_means"] | None = None) -> Float[Tensor, "new d_out"]:
        """As `Growing.add_items`. New items inherit their ID part, if embeddings have one, and their neighbours from
        the known items nearest by text. Raises UserError for items of which more or less is known than of those that
        are there: vectors of their own."""
        first = len(self.vectors)
        try:
            if self.texts is not None:
                self.texts.add(items)
            if isinstance(self.item_side, MeanItems):
                own = self._means(items, self.item_side.means) if means is None else means.to(self.device)
                self.item_side.add(own)
            if vectors is None:
                rows = torch.arange(first, first + items.height, device=self.device)
                parents = self._known_vectors() if self.id_share else None
                vectors = self.embed_items(self.item_outputs(rows), rows, parents)
            self._add_vectors(vectors.to(self.device))
        except BaseException:
            self.drop_items(first)
            raise
        return vectors

    def _means(self, items: pl.DataFrame, own: Float[Tensor, "n_items d_means"]) -> Float[Tensor, "new d_means"]:
        """Of new items, as wide as those of its own."""
        means = self.features.means(items)
        if means.shape[1] != own.shape[1]:
            raise UserError("the model was fitted on items with other vectors of their own, or with none "
                            "(backbone.item_vectors), than these items have; it can't compare them")
        return means

    def _known_vectors(self) -> Float[Tensor, "known d_out"]:
        """Embeddings of the items that the ID model knows; no copy where they are the first ones."""
        known = self.ids.knows(torch.arange(len(self.vectors), device=self.device))
        count = int(known.sum())
        return self.vectors[:count] if bool(known[:count].all()) else self.vectors[known]

    def _inheriting(self) -> list[Neighbours | Ranker]:
        return [part for part in (self.neighbours, self.ranker) if part is not None]

    def _add_vectors(self, new: Float[Tensor, "new d_out"]) -> None:
        """As `set_items` of all, without another look at those that are there."""
        text, first = new[:, : self.d_text], self.vectors[: self.n_known, : self.d_text]
        if isinstance(self.user_side, StudentUsers):
            self.user_side.add(F.normalize(text, dim=-1))
        if (inheriting := self._inheriting()) and self.n_known > 0:
            parents = nearest_known(text, first)
            for part in inheriting:
                part.inherit_behind(*parents)
        self.vectors = self._room.add(self.vectors, new)

    def drop_items(self, count: int) -> None:
        """Forget the items behind the first `count`."""
        if self.texts is not None:
            self.texts.truncate(count)
        if isinstance(self.item_side, MeanItems):
            self.item_side.means = self.item_side.means[:count]
        self.set_items(self.vectors[:count])

    def item_tensors(self) -> dict[str, Tensor]:
        """What a model folder keeps of the items beside their text: embeddings and, if used, mean outputs."""
        means = {"means": self.item_side.means} if isinstance(self.item_side, MeanItems) else {}
        return {"vectors": self.vectors, **means}


class _Ranking:
    """The ranker of a Laser and the terms before it, as one score term."""

    def __init__(self, laser: Laser, ranker: Ranker):
        self.laser, self.ranker = laser, ranker

    def on(self, histories: Histories, users: Float[Tensor, "users d_out"]) -> AppliedRanker:
        """As `ScoreTerm.on`."""
        laser, here = self.laser, histories.to(self.laser.device)
        boosts = None if laser.neighbours is None else laser.neighbours.on(here)
        offset = None if laser.seen is None else laser.seen.on(here)
        pairs = here.distinct() if offset is None else offset.pairs
        seen = AtPairs(pairs, torch.ones(len(pairs.users), device=laser.device), torch.add)
        terms = [term for term in (boosts, offset) if term is not None]
        return AppliedRanker(self.ranker, terms, boosts, seen, laser.newest(here), users[:, laser.d_text :],
                             laser.vectors, here.lengths)
