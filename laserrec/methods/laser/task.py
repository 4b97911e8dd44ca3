"""Training Laser in two stages (paper, 3.3.2).

Stage 1: item embeddings are encoded anew at every epoch's end; the epoch that is best on validation is kept.
Stage 2: training goes on from there against that epoch's item embeddings, which stay fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.config import Negatives
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories, Pairs
from laserrec.llm.whitening import fit_whitening, whiten
from laserrec.methods.laser.examples import Batch, LaserExamples, epoch_examples
from laserrec.methods.laser.losses import contrast_of_some, item_contrast, load_balance
from laserrec.methods.laser.model import Laser
from laserrec.methods.laser.readers import Reader
from laserrec.methods.laser.sides import MeanItems
from laserrec.methods.protocol import Trainable
from laserrec.methods.sampled_softmax import Sampler
from laserrec.methods.targets import Candidates
from laserrec.util.device import move
from laserrec.util.distributed import World
from laserrec.util.progress import Progress

_SCALE_USERS = 256
"""Users whose cosines set the neighbours' scale."""
_TEXT_DIMS = 512
"""Of the whitened text vectors in the regression, for each depth."""


def scale_histories(dataset: Dataset) -> Histories:
    """Some training sequences, by which the neighbours are scaled; the same in every process."""
    sequences = dataset.train_sequences
    return sequences.take(np.linspace(0, len(sequences) - 1, min(_SCALE_USERS, len(sequences))).astype(int))


class LaserTask(Trainable):
    """One stage. fixed: the items' embeddings stay as they are (stage 2)."""

    def __init__(self, laser: Laser, dataset: Dataset, world: World, fixed: bool, progress: bool = False):
        self.module, self.dataset, self.world, self.fixed = laser, dataset, world, fixed
        self.progress = progress
        self.outputs: Float[Tensor, "n_items d_in"] = torch.zeros(0, laser.head.d_out, device=laser.device)
        self._white: tuple[Tensor, Tensor] | None = None

    # -- around the epochs --------------------------------------------------------------------------------------

    def start(self, pause: Callable[[], None]) -> None:
        """Whitening, neighbours and the items' embeddings, from the untrained model. Stage 2 after stage 1 has them."""
        laser = self.module
        if len(laser.vectors):
            return
        laser.eval()
        laser.n_known = self.dataset.n_items
        self.outputs = self._read_items()
        if laser.head.white is not None and laser.carried is None:
            laser.head.white.fit(self.outputs)
        if laser.added is not None and laser.reader is not None and laser.carried is None:
            laser.added.white.fit(self._suffix_outputs(laser.reader))
        if laser.neighbours is not None:
            laser.neighbours.fit(self.dataset.train_sequences, self.text_vectors())
        self.world.follow(laser.state_dict().values())
        self._embed()
        if laser.carried is not None:
            text, old = laser.vectors[:, : laser.d_text], laser.carried
            laser.set_text(torch.where(old.isnan(), text, old))
            self.scale_neighbours()

    def end_epoch(self) -> None:
        """Encode the items anew, unless they are fixed."""
        self.module.eval()
        if self.fixed:
            self.scale_neighbours()
            return
        if self.module.item_side.trained:
            self.outputs = self._read_items()
        self._embed()

    def _rows(self) -> Int[Tensor, "n_items"]:
        return torch.arange(self.dataset.n_items, device=self.module.device)

    def _read_items(self) -> Float[Tensor, "n_items d_in"]:
        if isinstance(self.module.item_side, MeanItems):
            return self.module.item_side.means
        return self._in_shares(self.module.item_outputs)

    def _in_shares(self, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows of all items, read by all processes together."""
        mine = torch.as_tensor(self.world.even_share(self.dataset.n_items))
        parts = []
        with Progress("encoding items", len(mine), self.progress and self.world.is_main) as bar:
            for rows in mine.to(self.module.device).split(512):
                parts.append(read(rows))
                bar.advance(len(rows))
        return self.world.gather_rows(torch.cat(parts), self.dataset.n_items)

    @torch.no_grad()
    def _suffix_outputs(self, reader: Reader) -> Float[Tensor, "n_items d_llm"]:
        """At the suffix, of the untrained items."""

        def read(rows: Tensor) -> Tensor:
            each = [Histories(r.cpu(), torch.arange(1, len(r) + 1)) for r in rows.split(64)]
            return torch.cat([reader.read_items(histories, plain=True) for histories in each])

        return self._in_shares(read)

    def text_vectors(self) -> Float[Tensor, "n_items d_text"]:
        """Of the frozen LLM, for the regression: every item's mean outputs, whitened."""
        laser = self.module
        if not isinstance(laser.item_side, MeanItems):
            return laser.features.vectors(self.dataset.items)
        depths = laser.features.parts(self.dataset.items)
        dims = min(_TEXT_DIMS, self.outputs.shape[1] // depths)
        return whiten(self.outputs, *fit_whitening(self.outputs, dims, depths), depths)

    @torch.no_grad()
    def _embed(self) -> None:
        self.module.set_items(self.module.embed_items(self.outputs, self._rows()))
        self.scale_neighbours()

    def scale_histories(self) -> Histories:
        """As the function of this name, of the data that is trained on."""
        return scale_histories(self.dataset)

    def scale_neighbours(self) -> None:
        """Set the neighbours' scale by the cosines of those users."""
        self.module.scale_neighbours(self.scale_histories())

    # -- one step -----------------------------------------------------------------------------------------------

    def begin_epoch(self, number: int) -> LaserExamples:
        """Examples by train.cuts."""
        self.module.train()
        train, sequences = self.module.config.train, self.dataset.train_sequences
        seed = train.seed, 2 if self.fixed else 1, number
        of, cut = epoch_examples(sequences, train.cuts, seed, train.epoch_examples, train.epoch_items,
                                 self.module.config.prompt.max_items)
        return LaserExamples(sequences, of, cut, self._tokens(sequences, of, cut),
                             self.module.config.mformer.state_dropout, self._sampler)

    def _tokens(self, sequences: Histories, of: Tensor, cut: Tensor) -> Int[np.ndarray, "examples"]:
        """What the LLM reads of each example, or its items where it reads none."""
        texts, window = self.module.texts, self.module.config.prompt.max_items
        each = torch.ones(self.dataset.n_items).long() if texts is None else torch.as_tensor(texts.lengths())
        total = torch.cat([each.new_zeros(1), each[sequences.items].cumsum(0)])
        end = sequences.starts[of] + cut
        overhead = 0 if self.module.reader is None else self.module.reader.overhead
        return (total[end] - total[end - cut.clamp(max=window)] + overhead).numpy()

    def loss(self, batch: Batch, rows: Int[np.ndarray, "some"]) -> dict[str, Tensor]:
        """Item contrast (Eq. 8) + balance_weight x load balance (Eq. 9-12), as shares of the whole batch's means."""
        laser, train, some = self.module, self.module.config.train, torch.as_tensor(rows)
        histories, hide = batch.histories.take(some), batch.hide[some]
        users, route = laser.user_side.text(histories, hide)
        offset = None if laser.seen is None else laser.seen.offset
        seen = histories.distinct() if offset is not None or not train.history_negatives else None
        targets = batch.targets[some]
        if batch.candidates is not None:
            contrast = self._sampled_contrast(users, batch.candidates, targets, seen, offset)
        elif train.negatives == Negatives.BATCH and not self.fixed:
            contrast = self._batch_contrast(users, batch, targets, seen, offset)
        else:
            there = None if seen is None else seen.to(laser.device)
            contrast = item_contrast(users, self._items_to_learn_from(), move(targets, laser.device), laser.temperature,
                                     there, offset)
        share = len(some) / len(batch.targets)
        contrast = contrast * share
        told = {"contrast": contrast} | ({} if offset is None else {"seen_offset": offset.detach() * share})
        if laser.log_temperature is not None:
            told["temperature"] = laser.log_temperature.detach().exp() * share
        if route is None:
            return {"loss": contrast, **told}
        shown = int((~hide).sum()) / max(1, int((~batch.hide).sum()))  # the balance is a mean over users that are shown
        balance = load_balance(route) * shown
        loss = contrast + train.balance_weight * balance
        return {"loss": loss, **told, "balance": balance, "experts": route.users_per_expert()}

    def _sampled_contrast(self, users: Float[Tensor, "some d_text"], candidates: Candidates,
                          targets: Int[Tensor, "some"], seen: Pairs | None, offset: Tensor | None) -> Tensor:
        """With the items drawn for the batch. A user's own target is among them for certain, so it counts once."""
        place = torch.searchsorted(candidates.items, targets)
        drawn = candidates.log_probability(torch.ones_like(place[:1]))
        correction = drawn.repeat(len(targets), 1).scatter_(1, place[:, None], 0.0)
        items = self._items_to_learn_from(candidates.items)
        return self._contrast_of_some(users, items, candidates.items, place, correction, seen, offset)

    def _batch_contrast(self, users: Float[Tensor, "some d_text"], batch: Batch, targets: Int[Tensor, "some"],
                        seen: Pairs | None, offset: Tensor | None) -> Tensor:
        """With all targets of the whole batch, embedded anew. The popular are among them more often (Yi et al. 2019,
        "Sampling-Bias-Corrected Neural Modeling")."""
        laser, rows = self.module, torch.unique(batch.targets)
        items = laser.head(laser.item_side.outputs(move(rows, laser.device)))
        return self._contrast_of_some(users, items, rows, torch.searchsorted(rows, targets),
                                      self._log_shares[None, rows], seen, offset)

    def _contrast_of_some(self, users: Float[Tensor, "some d_text"], items: Float[Tensor, "few d_text"],
                          rows: Int[Tensor, "few"], place: Int[Tensor, "some"],
                          correction: Float[Tensor, "#some few"], seen: Pairs | None, offset: Tensor | None) -> Tensor:
        """rows: of those items, ascending. place: of each user's target among them."""
        device = self.module.device
        there = None if seen is None else seen.among(rows).to(device)
        return contrast_of_some(users, items, move(place, device), self.module.temperature, move(correction, device),
                                there, offset)

    @cached_property
    def _sampler(self) -> Sampler | None:
        """Of the items that a step's targets are told from, where those are not all."""
        train, n_items = self.module.config.train, self.dataset.n_items
        if train.negatives != Negatives.SAMPLED or train.sampled_items >= n_items:
            return None
        return Sampler(self.dataset.train_sequences.without_oldest(), n_items, train.sampled_items)

    @cached_property
    def _log_shares(self) -> Float[Tensor, "n_items"]:
        """Logarithm of each item's share of the targets."""
        targets = self.dataset.train_sequences.without_oldest()
        counts = torch.bincount(targets.items, minlength=self.dataset.n_items).clamp(min=1)
        return (counts / counts.sum()).log()

    def _items_to_learn_from(self, rows: Int[Tensor, "some"] | None = None) -> Float[Tensor, "some d_text"]:
        """The text part of the epoch's item embeddings (paper), or with train.item_gradient the same with gradient to
        the head. rows: None: of all items."""
        laser, at = self.module, slice(None) if rows is None else move(rows, self.module.device)
        if not laser.config.train.item_gradient or self.fixed:
            return laser.vectors[at, : laser.d_text]
        if self._white is None or self._white[0] is not self.outputs:
            self._white = self.outputs, laser.head.whiten(self.outputs)
        return laser.head.project(self._white[1][at])

    # -- what the trainer keeps ---------------------------------------------------------------------------------

    def decayed(self) -> Iterable[Tensor]:
        """Weights of linear maps; decay would pull tokens, norms and biases away from where the LLM can read them."""
        return (m.weight for m in self.module.modules() if isinstance(m, nn.Linear))

    def state(self) -> dict[str, Tensor]:
        """Weights, items' embeddings, and outputs where training changes them."""
        state = {f"laser.{name}": tensor for name, tensor in self.module.state_dict().items()}
        state["vectors"] = self.module.vectors
        return state if isinstance(self.module.item_side, MeanItems) else {**state, "outputs": self.outputs}

    def load(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        laser, prefix = self.module, "laser."
        laser.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        laser.n_known = self.dataset.n_items if len(state["vectors"]) else 0
        laser.set_items(state["vectors"])
        self.outputs = laser.item_side.means if isinstance(laser.item_side, MeanItems) else state["outputs"]
