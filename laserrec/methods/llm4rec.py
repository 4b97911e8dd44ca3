"""LLM4REC (Wang, Wu, Hong, Liu & Fu 2024, "LLM-Enhanced User-Item Interactions: Leveraging Edge Information for
Optimized Recommendations", arXiv 2402.09617).

Users and items are tokens in the LLM's vocabulary. A prompt names the user and the history's items, and attention
between two of these tokens is raised where an edge of the training graph joins them: an item that the user took, or two
items that several users took. All weights are trained, the LLM's included. Every position predicts the next item, by
the full softmax over the items' own tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
import scipy.sparse
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from laserrec.config import Config, LLM4RecConfig, PromptConfig
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.data.prompt import PromptEncoder
from laserrec.llm.attention import rotary_tables
from laserrec.llm.backbone import Backbone
from laserrec.llm.decoder import NativeDecoder, Shape
from laserrec.methods.protocol import Phase, Trainable, TwoTower
from laserrec.methods.sequence import seen_offset
from laserrec.methods.sequence_task import with_next_item
from laserrec.methods.targets import Targets, next_item_targets, with_offset
from laserrec.methods.terms import SeenOffset
from laserrec.util.device import move
from laserrec.util.errors import UserError

_FRONT, _BACK = "The user", " took these items, in this order:"
_TITLE_TOKENS = 32
"""Of an item's title, whose mean embedding its token starts from."""
_KNOWN_FROM = 3
"""Items of a training sequence by which its user is known again."""


class Edges(nn.Module):
    """The training graph between items: the logarithm of how many users took both, so that a pair that one user alone
    took, as a training user's own pairs may be, weighs nothing. Who took what stands in the histories that are read:
    the graph keeps nobody's items."""

    pairs: Int[Tensor, "pairs"]
    weights: Float[Tensor, "pairs"]

    def __init__(self, n_items: int):
        super().__init__()
        self.n_items = n_items
        self.register_buffer("pairs", torch.zeros(0, dtype=torch.long))
        """item * n_items + item, ascending."""
        self.register_buffer("weights", torch.zeros(0))

    def fit(self, sequences: Histories) -> None:
        """From training sequences."""
        taken, device = sequences.distinct(), self.pairs.device
        shape = len(sequences), self.n_items
        matrix = scipy.sparse.csr_matrix((np.ones(len(taken.users)), (taken.users.numpy(), taken.items.numpy())), shape)
        both = (matrix.T @ matrix).tocoo()
        kept = (both.row != both.col) & (both.data > 1)
        keys, counts = both.row[kept].astype(np.int64) * self.n_items + both.col[kept], both.data[kept]
        order = np.argsort(keys)
        self.pairs = move(torch.from_numpy(keys[order]), device)
        self.weights = move(torch.from_numpy(np.log(counts[order])).float(), device)

    def forward(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq seq"]:
        """Between the items of each history."""
        at, there = _found(self.pairs, items[:, :, None] * self.n_items + items[:, None])
        return self.weights[at] * there if len(self.weights) else there.float()


def _found(keys: Int[Tensor, "keys"], asked: Int[Tensor, "*some"]
           ) -> tuple[Int[Tensor, "*some"], Bool[Tensor, "*some"]]:
    """Where each number stands among ascending keys, and whether it does."""
    if not len(keys):
        return asked, torch.zeros_like(asked, dtype=torch.bool)
    at = torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)
    return at, keys[at] == asked


class Layer(nn.Module):
    """One of the LLM's layers, all of it trained, with a weight of each kind of edge for each head, which starts at 1.
    The norms' scales are in the maps behind them."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None

    def __init__(self, source: nn.Module, shape: Shape, edges: bool):
        super().__init__()
        self.shape = shape
        for name in ("qkv", "out", "gate_up", "down", "qkv_bias", "out_bias", "gate_up_bias", "down_bias", "q_norm",
                     "k_norm"):
            weight = getattr(source, name)
            self.register_parameter(name, None if weight is None else nn.Parameter(weight.detach().float().clone()))
        self.edge = nn.Parameter(torch.ones(2, shape.heads)) if edges else None

    def forward(self, x: Float[Tensor, "batch seq d_llm"], rotary: tuple[Tensor, Tensor],
                edges: Float[Tensor, "kinds batch seq seq"]) -> Float[Tensor, "batch seq d_llm"]:
        s = self.shape
        qkv = F.linear(_normed(x, s), self.qkv, self.qkv_bias).unflatten(-1, (-1, s.head_dim)).transpose(1, 2)
        q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normed(q, s) * self.q_norm, _normed(k, s) * self.k_norm
        q, k = _turned(q, rotary), _turned(k, rotary)
        k, v = k.repeat_interleave(s.groups, dim=1), v.repeat_interleave(s.groups, dim=1)
        scores = q @ k.transpose(-1, -2) * s.head_dim**-0.5
        if self.edge is not None:
            scores = scores + torch.einsum("kbts,kh->bhts", edges, self.edge)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        y = scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ v
        x = x + F.linear(y.transpose(1, 2).flatten(2), self.out, self.out_bias)
        gate, up = F.linear(_normed(x, s), self.gate_up, self.gate_up_bias).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down, self.down_bias)


def _normed(x: Tensor, shape: Shape) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=shape.norm_eps)


def _turned(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def prefix_hashes(histories: Histories) -> Int[Tensor, "total"]:
    """A number for each item's place that tells the history up to there from others, by chance in 2**64."""
    place = torch.arange(len(histories.items)) - histories.starts[histories.users]
    x = (histories.items + 1) * 6364136223846793005 + (place + 1) * 1442695040888963407
    x = (x ^ (x >> 30)) * 2862933555777941757
    sums = torch.cat([x.new_zeros(1), (x ^ (x >> 27)).cumsum(0)])
    return sums[1:] - sums[histories.starts][histories.users]


class LLM4Rec(nn.Module, TwoTower):
    """A two-tower model: the output behind the history, and the items' tokens."""

    known_hashes: Int[Tensor, "known"]
    known_rows: Int[Tensor, "known"]
    inverse_frequency: Float[Tensor, "half"]

    def __init__(self, config: LLM4RecConfig, n_items: int, items: pl.DataFrame, backbone: Backbone):
        super().__init__()
        decoder = backbone.decoder
        if not isinstance(decoder, NativeDecoder):
            raise UserError("llm4rec trains the weights of a native decoder (Llama, Mistral, Qwen2, Qwen3) and "
                            f"backbone {backbone.name!r} runs on transformers'; take another backbone")
        self.config, self.n_items, self.shape, table = config, n_items, decoder.shape, backbone.embedding
        self.token_std = float(table.float().std())
        front, back = (backbone.embed(backbone.tokens(backbone.tokenizer(text, add_special_tokens=False)["input_ids"]))
                       for text in (_FRONT, _BACK))
        self.front, self.back = nn.Parameter(front.float().clone()), nn.Parameter(back.float().clone())
        titles = PromptEncoder(backbone.tokenizer, PromptConfig(attributes=(), max_item_tokens=_TITLE_TOKENS)
                               ).item_tokens(items.head(n_items))
        means = [backbone.embed(backbone.tokens(title)).float().mean(dim=0) for title in titles]
        self.item = nn.Parameter(torch.stack([*means, torch.zeros_like(means[0])]))
        """The items' tokens; the last row is padding."""
        self.layers = nn.ModuleList(Layer(layer, decoder.shape, config.edges) for layer in decoder.layers)
        self.final_norm = nn.Parameter(decoder.final_norm.detach().float().clone())
        self.register_buffer("inverse_frequency", decoder.inverse_frequency.clone(), persistent=False)
        self.edges = Edges(n_items)
        self.register_buffer("known_hashes", torch.zeros(0, dtype=torch.long))
        self.register_buffer("known_rows", torch.zeros(0, dtype=torch.long))
        self.user = nn.Parameter(torch.zeros(1, decoder.shape.d_llm))
        """The users' tokens; the last row is an unknown user's."""
        self.seen = seen_offset(config.seen_offset)
        self.to(backbone.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.item.device

    @property
    def terms(self) -> list[SeenOffset]:
        """The learnt seen offset, if there is one."""
        return [] if self.seen is None else [self.seen]

    def know(self, sequences: Histories) -> None:
        """Make the graph of the training sequences, fresh tokens of their users, and what tells the users again: two
        users of the same sequence are not told apart."""
        self.edges.fit(sequences)
        self.user = nn.Parameter(torch.randn(len(sequences) + 1, self.shape.d_llm).to(self.device) * self.token_std)
        long = (sequences.lengths >= _KNOWN_FROM).nonzero()[:, 0]
        hashes, order = prefix_hashes(sequences)[sequences.ends[long] - 1].sort()
        once = torch.ones(len(hashes), dtype=torch.bool)
        same = hashes[1:] == hashes[:-1]
        once[1:] &= ~same
        once[:-1] &= ~same
        self.known_hashes, self.known_rows = move(hashes[once], self.device), move(long[order][once], self.device)

    def known_users(self, histories: Histories) -> tuple[Int[Tensor, "users"], Bool[Tensor, "total"]]:
        """Of histories on the CPU: numbers of the training users whose whole sequence they begin with (of an unknown
        one, the last row of the tokens), and which of the items that user took in training."""
        at, hit = _found(self.known_hashes.cpu(), prefix_hashes(histories))
        unknown = len(self.user) - 1
        place = torch.where(hit, torch.arange(len(at)), -1)
        last = torch.full((len(histories),), -1).scatter_reduce(0, histories.users, place, "amax")
        rows = torch.full((len(histories),), unknown)
        found = last >= 0
        rows[found] = self.known_rows.cpu()[at[last[found]]]
        keys, trained = histories.users * self.n_items + histories.items, torch.arange(len(at)) <= last[histories.users]
        return rows, torch.isin(keys, keys[trained])

    def states(self, items: Int[Tensor, "batch seq"], users: Int[Tensor, "batch"],
               taken: Bool[Tensor, "batch seq"] | None = None) -> Float[Tensor, "batch seq d_llm"]:
        """The output at each item, which predicts the next one. Padding stands on the right, where nothing sees it.
        taken: items that have an edge with the user; None: none has."""
        batch, front = len(items), len(self.front) + 1 + len(self.back)
        x = torch.cat([self.front.expand(batch, -1, -1), self.user[users][:, None], self.back.expand(batch, -1, -1),
                       F.embedding(items, self.item)], dim=1)
        seq, at = x.shape[1], len(self.front)
        edges = x.new_zeros(2, batch, seq, seq)
        if self.config.edges:
            if taken is not None:
                edges[0, :, front:, at] = taken.float()
            edges[1, :, front:, front:] = self.edges(items)
        rotary = rotary_tables(torch.arange(seq, device=x.device), self.inverse_frequency)
        for layer in self.layers:
            x = layer(x, rotary, edges)
        return _normed(x[:, front:], self.shape) * self.final_norm

    def users(self, histories: Histories) -> Float[Tensor, "users d_out"]:
        """The output at each history's newest item. Raises UserError for an empty history."""
        if len(histories) and int(histories.lengths.min()) == 0:
            raise UserError(f"history {int(histories.lengths.argmin())} (counted from 0) is empty; llm4rec needs at "
                            "least one item")
        histories, count = histories.to(torch.device("cpu")), self.config.max_history
        who, taken = self.known_users(histories)
        items = move(histories.last(count).padded(self.n_items), self.device)
        edges = Histories(taken.long(), histories.ends).last(count).padded(0).bool()
        newest = (items != self.n_items).sum(dim=1) - 1
        states = self.states(items, move(who, self.device), move(edges, self.device))
        return states[torch.arange(len(items), device=self.device), newest]

    def items(self, rows: Int[Tensor, "some"] | None = None) -> Float[Tensor, "items d_out"]:
        """The items' tokens."""
        table = self.item[: self.n_items]
        return table if rows is None else table[rows]


@dataclass(frozen=True)
class UserBatch:
    """What is predicted in training sequences, and their users."""

    targets: Targets
    users: Int[Tensor, "batch"]


@dataclass(frozen=True)
class UserExamples:
    """One epoch's sequences."""

    sequences: Histories
    users: Int[Tensor, "examples"]
    model: LLM4Rec

    @property
    def lengths(self) -> Int[np.ndarray, "examples"]:
        """Items of each."""
        return self.sequences.lengths.numpy()

    def batch(self, index: Int[np.ndarray, "batch"]) -> UserBatch:
        """On the CPU; some users are made unknown ones."""
        model = self.model
        users = self.users[index].masked_fill(torch.rand(len(index)) < model.config.user_dropout, len(model.user) - 1)
        items = self.sequences.take(index).padded(model.n_items)
        return UserBatch(next_item_targets(items, model.n_items, model.seen is not None), users)


class LLM4RecTask(Trainable):
    """Next-item prediction at every position."""

    def __init__(self, model: LLM4Rec, dataset: Dataset):
        """Raises UserError where no sequence has a next item."""
        self.module, sequences = model, dataset.train_sequences
        model.know(sequences)
        self.users = with_next_item(sequences)
        self.sequences = sequences.take(self.users).last(model.config.max_history + 1)  # the last one is a target alone

    def decayed(self) -> Iterable[Tensor]:
        """Weights of the layers' maps."""
        return (p for name, p in self.module.layers.named_parameters() if p.ndim > 1 and not name.endswith("edge"))

    def begin_epoch(self, number: int) -> UserExamples:
        """All sequences."""
        self.module.train()
        return UserExamples(self.sequences, self.users, self.module)

    def loss(self, batch: UserBatch, rows: Int[np.ndarray, "some"]) -> dict[str, Tensor]:
        """The rows' share of the mean over all targets of the batch."""
        model, some = self.module, torch.as_tensor(rows)
        part, users = batch.targets.rows(some).to(model.device), move(batch.users[some], model.device)
        taken = (users != len(model.user) - 1)[:, None].expand_as(part.inputs)  # all of a training sequence
        logits = model.states(part.inputs, users, taken).flatten(0, 1)[part.places] @ model.items().T
        if model.seen is not None:
            logits = with_offset(logits, part.seen, model.seen.offset)
        return {"loss": F.cross_entropy(logits, part.items, reduction="sum") / len(batch.targets.places)}


def phases(model: LLM4Rec, config: Config, dataset: Dataset) -> list[Phase]:
    """One stretch."""
    own = model.config
    return [Phase("llm4rec", LLM4RecTask(model, dataset), own.max_epochs, own.batch_size, own.lr, own.weight_decay,
                  patience=own.patience, eval_every=own.eval_every)]


def restore(model: LLM4Rec, weights: dict[str, Tensor]) -> LLM4Rec:
    """A fresh model with fitted weights. Raises RuntimeError where they don't fit."""
    for name in ("edges.pairs", "edges.weights", "known_hashes", "known_rows"):
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, torch.empty_like(weights[name], device=model.device))
    model.user = nn.Parameter(torch.empty_like(weights["user"], device=model.device))
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)
