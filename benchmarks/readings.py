"""The tries of benchmarks/reading.py: what reads a history, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laserrec.config import Config, TransformerConfig
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories, Pairs
from laserrec.llm.attention import Heads, Past, rotary_tables
from laserrec.llm.backbone import Backbone
from laserrec.methods.laser.head import AddedOutput, Head, Whitening
from laserrec.methods.laser.id_states import IdStates
from laserrec.methods.laser.losses import item_contrast
from laserrec.methods.laser.model import Laser
from laserrec.methods.laser.readers import PrefixFirst, Reader, TextFirst
from laserrec.methods.laser.sides import MeanItems, SummedUsers
from laserrec.methods.laser.task import LaserTask
from laserrec.methods.laser.texts import Texts
from laserrec.methods.laser.transformer import HistoryTransformer
from laserrec.methods.neighbours import Neighbours
from laserrec.methods.terms import SeenOffset
from laserrec.util.device import move
from laserrec.util.distributed import World


@dataclass(frozen=True)
class Try:
    """How a variant differs from the preset."""

    reading: str | None = "suffix"
    prefix: str = "mformer"
    layers: int | None = None
    distil: bool = False
    items_first: bool = False
    fast: bool = False
    summed: bool = True


TRIES = {
    "none": Try(None), "bi-tuning": Try(), "no-prefix": Try(prefix="none"), "learned": Try(prefix="learned"),
    "distil": Try(distil=True), "each": Try("each"), "transformer": Try("transformer"),
    "items-first": Try(items_first=True), "none-items-first": Try(None, items_first=True), "gate": Try(fast=True),
    "alone": Try(summed=False), "both-depths": Try("depths", layers=12), "layers-12": Try(layers=12),
    "layers-20": Try(layers=20), "layers-30": Try(layers=30), "every-layer": Try("every layer"), "lora": Try("lora"),
}
DEAR = ("lora",)


@dataclass(frozen=True)
class Options:
    """Weights and sizes of the tries."""

    distil_weight: float = 1.0
    uniformity_weight: float = 0.1
    gate_rate: float = 4.0
    contrast_steps: int = 300
    contrast_batch: int = 256
    contrast_lr: float = 1e-3
    d_model: int = 256
    blocks: int = 2
    heads: int = 4
    dropout: float = 0.2
    lora_rank: int = 8


# -- readings ---------------------------------------------------------------------------------------------------------


class Each(TextFirst):
    """[instruction][item][token][item][token] ... [suffix]. A token is made of the ID model's state at its item; it
    sees the texts and tokens up to there. Texts see themselves alone, and are cached."""

    def __init__(self, config: Config, backbone: Backbone, texts: Texts, ids: IdStates):
        super().__init__(config, backbone, texts, ids)
        table, width = backbone.embedding.float(), config.mformer.d_model
        last = nn.Linear(width, backbone.d_llm)
        self.token = nn.Sequential(nn.LayerNorm(ids.d_id), nn.Linear(ids.d_id, width), nn.GELU(), last)
        nn.init.normal_(last.weight, std=float(table.std()) / width**0.5)
        mean = table.mean(dim=0).cpu()
        last.bias.data.copy_(mean)
        self.unknown = nn.Parameter(mean.clone())
        self._lengths = torch.as_tensor(texts.lengths())
        self.to(backbone.device)

    def read(self, histories: Histories, hide: Tensor | None = None) -> tuple[Tensor, None]:
        recent = histories.last(self.texts.config.max_items)
        width = int(recent.lengths.max())
        added = torch.cat([self._tokens(histories, width, hide), self.suffix.expand(len(recent), 1, -1)], dim=1)
        attention = self._attention(self.texts.past(histories), recent, width)
        return self.texts.decoder.read(added.flatten(0, 1), attention, last_only=True), None

    def _tokens(self, histories: Histories, width: int, hide: Tensor | None) -> Tensor:
        """[batch width d_llm], the newest item's last; a learnt one where there is no state."""
        states, _ = self.ids.states(histories)
        known = self.ids.knows(histories.items).long()
        count = torch.zeros_like(histories.ends).index_add_(0, histories.users, known)
        later = count.cumsum(0)[histories.users] - known.cumsum(0)  # known items behind each
        of = count.clamp(max=states.shape[1])[histories.users] - 1 - later
        recent = histories.ages < width
        at = histories.users[recent], width - 1 - histories.ages[recent]
        index = torch.full((len(histories), width), -1)
        index[at] = of[recent]
        index = index if hide is None else index.masked_fill(hide[:, None], -1)
        index = move(index, states.device)
        own = states.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, states.shape[2]))
        return torch.where((index >= 0)[..., None], self.token(own), self.unknown)

    def _attention(self, past: Past, recent: Histories, width: int) -> Interleaved:
        users, device = recent.users, self.backbone.device
        first, start = len(self.texts.prompt.instruction), width - recent.lengths  # the oldest item's column
        number = torch.arange(len(recent.items)) - recent.starts[users]
        lengths = self._lengths[recent.items]
        ends = lengths.cumsum(0)
        before = torch.cat([ends.new_zeros(1), ends])[recent.starts]  # tokens of all histories in front of each
        ends = ends - before[users] + first
        owner = torch.full(past.index.shape, -1)
        old = torch.arange(past.index.shape[1]).expand(past.index.shape).clone()
        new = torch.zeros(len(recent), width + 1, dtype=torch.long)
        of, count = users.repeat_interleave(lengths), number.repeat_interleave(lengths)
        place = torch.arange(len(of)) - before[of] + first
        owner[of, place], old[of, place] = start[of] + count, place + count
        new[users, start[users] + number] = ends + number
        total = torch.zeros_like(recent.ends).index_add_(0, users, lengths)
        new[:, -1] = total + first + recent.lengths
        real = torch.arange(width + 1) >= start[:, None]
        tensors = (move(x, device) for x in (owner, old, new, real))
        return Interleaved(past, *tensors, self.texts.decoder.shape, self.texts.decoder.inverse_frequency)


class Interleaved:
    """New tokens between texts that were read before; the newest stands in the last column, unused columns in front.

    owner: the column of the new token behind each old one's item, -1 of the instruction. old, new: positions."""

    def __init__(self, past: Past, owner: Tensor, old: Tensor, new: Tensor, real: Tensor, heads: Heads,
                 inverse_frequency: Tensor):
        self.past, self.heads, (self.batch, self.seq) = past, heads, new.shape
        device, dtype = owner.device, past.cache.keys.dtype
        self.ends = torch.arange(1, self.batch + 1, device=device) * self.seq - 1
        column = torch.arange(self.seq, device=device)
        there = torch.arange(owner.shape[1], device=device) < past.length[:, None]
        texts = there[:, None] & (owner[:, None] <= column[:, None])
        tokens = (real[:, None] & (column <= column[:, None])) | torch.eye(self.seq, dtype=torch.bool, device=device)
        self._visible = torch.cat([texts, tokens], dim=2).repeat(1, heads.groups, 1)[:, None]
        self._old, self._new = (tuple(t[:, :, None].to(dtype) for t in rotary_tables(x, inverse_frequency))
                                for x in (old, new))

    def __call__(self, qkv: Tensor, layer: int, last_only: bool) -> Tensor:
        h, cache, visible = self.heads, self.past.cache, self._visible
        q, k, v = qkv.unflatten(0, (self.batch, self.seq)).split([h.heads, h.kv_heads, h.kv_heads], dim=2)
        q, k = turned(q, *self._new), turned(k, *self._new)
        old_k, old_v = (x[layer][self.past.index].unflatten(2, (h.kv_heads, -1)) for x in (cache.keys, cache.values))
        k = torch.cat([turned(old_k, *self._old), k], dim=1).transpose(1, 2)
        v = torch.cat([old_v, v], dim=1).transpose(1, 2)
        if last_only:
            q, visible = q[:, -1:], visible[:, :, self.seq - 1 :: self.seq]
        q = q.unflatten(2, (h.kv_heads, h.groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return out.unflatten(2, (h.groups, -1)).permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Depths(TextFirst):
    """The suffix's outputs behind half of the layers and all of them, side by side."""

    def _outputs(self, histories: Histories, prefix: Tensor, suffix: Tensor, as_item: bool) -> Tensor:
        added = torch.cat([prefix, suffix.expand(len(prefix), 1, -1)], dim=1)
        decoder = self.texts.decoder
        attention = decoder.behind(self.texts.past(histories), added.shape[1])
        x, delta, found = added.flatten(0, 1).to(decoder.dtype), None, []
        for i, layer in enumerate(decoder.layers):
            x, delta = layer(x, delta, attention, i, False)
            if i + 1 in (decoder.shape.layers // 2, decoder.shape.layers):
                total = (x.float() + delta.float())[attention.ends]
                found.append(F.rms_norm(total, total.shape[-1:], decoder.final_norm, decoder.shape.norm_eps))
        return torch.cat(found, dim=-1)


class EveryLayer(TextFirst):
    """Prefix tuning at every layer beside the input's (Li & Liang 2021; Liu et al. 2022, "P-Tuning v2"): what is added
    to the prefix tokens' keys and values is trained, layer by layer, zero at first."""

    def __init__(self, config: Config, backbone: Backbone, texts: Texts, ids: IdStates):
        super().__init__(config, backbone, texts, ids)
        h = backbone.decoder.shape
        self.added = nn.Parameter(torch.zeros(h.layers, config.mformer.queries, 2 * h.kv_heads, h.head_dim))
        self.to(backbone.device)

    def _outputs(self, histories: Histories, prefix: Tensor, suffix: Tensor, as_item: bool) -> Tensor:
        tokens = torch.cat([prefix, suffix.expand(len(prefix), 1, -1)], dim=1)
        decoder = self.texts.decoder
        behind = decoder.behind(self.texts.past(histories), tokens.shape[1])
        return decoder.read(tokens.flatten(0, 1), Changed(behind, self.added, len(prefix)), last_only=True)


class Changed:
    """Attention in which the first new tokens' keys and values are changed."""

    def __init__(self, attention: Any, added: Tensor, batch: int):
        self.attention, self.added, self.batch, self.ends = attention, added, batch, attention.ends

    def __call__(self, qkv: Tensor, layer: int, last_only: bool) -> Tensor:
        queries, kv = self.added.shape[1:3]
        change = F.pad(self.added[layer], (0, 0, qkv.shape[1] - kv, 0, 0, len(qkv) // self.batch - queries))
        qkv = (qkv.unflatten(0, (self.batch, -1)) + change.to(qkv.dtype)).flatten(0, 1)
        return self.attention(qkv, layer, last_only)


class Lora(PrefixFirst):
    """The whole text is read in every step, by layers whose queries and values are adapted (Hu et al. 2021)."""

    def __init__(self, config: Config, backbone: Backbone, texts: Texts, ids: IdStates, rank: int):
        super().__init__(config, backbone, texts, ids)
        self.adapters = nn.ModuleList(Adapter(layer, backbone.decoder.shape, rank) for layer in backbone.decoder.layers)
        self.to(backbone.device)


class Adapter(nn.Module):
    """Low-rank changes of a layer's queries and values, zero at first. It takes the place of the layer's `project`."""

    def __init__(self, layer: Any, shape: Any, rank: int):
        super().__init__()
        self.shape, self.frozen = shape, layer.project
        self.down = nn.Linear(shape.d_llm, 2 * rank, bias=False)
        self.query = nn.Linear(rank, shape.heads * shape.head_dim, bias=False)
        self.value = nn.Linear(rank, shape.kv_dim, bias=False)
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.value.weight)
        layer.project = self.project

    def project(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        s = self.shape
        x, qkv = self.frozen(x, delta)
        low = self.down(F.rms_norm(x.float(), x.shape[-1:], eps=s.norm_eps)).chunk(2, dim=-1)
        changes = (m(part).to(qkv.dtype).unflatten(-1, (-1, s.head_dim))
                   for m, part in zip((self.query, self.value), low, strict=True))
        q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        return x, torch.cat([q + next(changes), k, v + next(changes)], dim=1)


class Added(AddedOutput):
    """What the outputs of one or more depths add. rate: of its learning; Adam's steps are the same for a map of any
    scale."""

    def __init__(self, config: Config, d_llm: int, d_out: int, depths: int, rate: float):
        super().__init__(config.head, d_llm, d_out)
        self.rate, self.last = rate, torch.zeros(0)
        if depths > 1:
            self.white = Whitening(depths * d_llm, self.white.dims, depths)
            self.map = nn.Linear(depths * self.white.dims, d_out, bias=False)
            nn.init.zeros_(self.map.weight)

    def forward(self, outputs: Tensor) -> Tensor:
        self.last = outputs
        return self.rate * super().forward(outputs)


class Users(SummedUsers):
    """Keeps the last batch's vectors, for losses. summed: False: the output alone makes the user."""

    summed = True

    def text(self, histories: Histories, hide: Tensor | None = None) -> tuple[Tensor, Any]:
        if self.summed:
            self.last, route = super().text(histories, hide)
        else:
            outputs, route = self.reader.read(histories, hide)
            self.last = self.added(outputs)
        return self.last, route


# -- training ---------------------------------------------------------------------------------------------------------


class Task(LaserTask):
    """A stage of a try."""

    def __init__(self, laser: Laser, dataset: Dataset, fixed: bool, tried: Try, options: Options):
        super().__init__(laser, dataset, World(), fixed)
        self.tried, self.options = tried, options

    def start(self, pause: Any) -> None:
        fresh = not len(self.module.vectors)
        super().start(pause)
        if fresh and not self.tried.summed:
            self._start_alone()
        if fresh and self.tried.items_first:
            self._learn_items()
            self.module.eval()
            self._embed()

    @torch.no_grad()
    def _start_alone(self) -> None:
        """The map that makes of an item's output its whitened mean, by least squares."""
        laser = self.module
        outputs = laser.added.white(self._suffix_outputs(laser.reader))
        laser.added.map.weight.copy_(laser.head.whiten(self.outputs).T @ outputs / len(outputs) / laser.added.rate)

    def _learn_items(self) -> None:
        """Contrast of items that follow each other in a training sequence with all others, both ways."""
        laser, o, sequences = self.module, self.options, self.dataset.train_sequences
        pairs = torch.stack([sequences.items[:-1], sequences.items[1:]], dim=1)
        pairs = pairs[(sequences.users[:-1] == sequences.users[1:]) & (pairs[:, 0] != pairs[:, 1])]
        pairs = torch.cat([pairs, pairs.flip(1)])
        rng, white = np.random.default_rng(laser.config.train.seed), laser.head.whiten(self.outputs)
        optimizer = torch.optim.AdamW([laser.head.projection.weight], lr=o.contrast_lr,
                                      weight_decay=laser.config.train.weight_decay)
        laser.train()
        user = torch.arange(o.contrast_batch, device=laser.device)
        for _ in range(o.contrast_steps if len(pairs) else 0):
            one, other = move(pairs[rng.integers(0, len(pairs), o.contrast_batch)], laser.device).unbind(1)
            items = laser.head.project(white)
            optimizer.zero_grad()
            item_contrast(items[one], items, other, laser.temperature, Pairs(user, one)).backward()
            optimizer.step()

    def loss(self, batch: Any, rows: np.ndarray) -> dict[str, Tensor]:
        told = super().loss(batch, rows)
        if not self.tried.distil:
            return told
        laser, o, unit = self.module, self.options, F.normalize
        rows = torch.as_tensor(rows)
        teacher = laser.ids.user(batch.histories.take(rows))
        shown = teacher.any(dim=1) & ~move(batch.hide[rows], laser.device)
        distance = unit(laser.to_ids(laser.added.white(laser.added.last)), dim=-1) - unit(teacher, dim=-1)
        align = (distance.square().sum(dim=1) * shown).sum() / shown.sum().clamp(min=1)
        spread = uniformity(laser.user_side.last)
        if not self.fixed:
            targets = move(torch.unique(batch.targets[rows]), laser.device)
            spread = spread + uniformity(laser.head(self.outputs[targets]))
        share = len(rows) / len(batch.targets)
        loss = told["loss"] + share * (o.distil_weight * align + o.uniformity_weight * spread)
        return {**told, "loss": loss, "align": align * share, "uniformity": spread * share}


def uniformity(x: Tensor) -> Tensor:
    """Logarithm of the mean of exp(-2 distance^2) between any two (Wang & Isola 2020)."""
    if len(x) < 2:
        return x.sum() * 0
    x = F.normalize(x, dim=-1)
    same = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return (4 * (x @ x.T) - 4).masked_fill(same, -torch.inf).logsumexp(dim=(0, 1)) - np.log(len(x) * (len(x) - 1))


def compose(shared: Any, config: Config, tried: Try, o: Options) -> Laser:
    """A fresh model; torch is seeded before."""
    items, ids = shared.dataset.items, IdStates(shared.below.model, shared.device, config.head.id_product)
    mean_items = MeanItems(shared.means)
    head = Head(config.head, shared.means.shape[1], shared.features.parts(items))
    texts = reader = added = transformer = None
    if tried.reading == "transformer":
        size = TransformerConfig(d_model=o.d_model, d_inner=2 * o.d_model, blocks=o.blocks, heads=o.heads,
                                 dropout=o.dropout, max_history=config.id_model.max_history)
        transformer = HistoryTransformer(size, head.d_out)
    elif tried.reading is not None:
        texts = shared.texts(config, tried.reading == "lora")
        reader, depths = read_by(tried.reading, config, texts, ids, o)
        added = Added(config, reader.backbone.d_llm, head.d_out, depths, o.gate_rate if tried.fast else 1.0)
    side = Users(mean_items, head, config.prompt.decay, reader, added, transformer)
    side.summed = tried.summed
    laser = Laser(config, side, mean_items, head, ids, shared.features, texts, reader, added, transformer,
                  neighbours=Neighbours(config.neighbours, items.height),
                  seen=SeenOffset(config.head.seen_offset_start))
    laser.to_ids = nn.Linear(len(added.white.matrix[0]) * added.white.depths, ids.d_id) if tried.distil else None
    laser.n_known = items.height
    return laser.to(shared.device)


def read_by(name: str, config: Config, texts: Texts, ids: IdStates, o: Options) -> tuple[Reader, int]:
    """A reader, and at how many depths it reads."""
    if name == "lora":
        return Lora(config, texts.backbone, texts, ids, o.lora_rank), 1
    kind = {"suffix": TextFirst, "each": Each, "depths": Depths, "every layer": EveryLayer}[name]
    return kind(config, texts.backbone, texts, ids), 2 if kind is Depths else 1
