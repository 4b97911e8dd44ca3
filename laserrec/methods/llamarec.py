"""LlamaRec (Yue, Rabhi, de Souza Pereira Moreira, Wang & Oldridge 2023, "LlamaRec: Two-Stage Recommendation using Large
Language Models for Ranking").

LRURec retrieves the best items for a history. The LLM reads the titles of the history and of those candidates, each
behind a letter, and the logits of the letters at the last position rank them. Only low-rank updates of the LLM's query
and value maps are trained (LoRA, Hu et al. 2022). All other items stand behind the candidates in the retriever's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.config import Config, Cuts, LlamaRecConfig, PromptConfig
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories, Pairs
from laserrec.data.prompt import PromptEncoder
from laserrec.llm.backbone import Backbone
from laserrec.llm.decoder import NativeDecoder, Shape
from laserrec.methods.laser.examples import cut_histories, epoch_examples
from laserrec.methods.lrurec import LRURec, retriever_phase
from laserrec.methods.lrurec import shapes as retriever_shapes
from laserrec.methods.protocol import Phase, ScoreTerm, Trainable, TwoTower
from laserrec.methods.sequence_task import SequenceTask
from laserrec.methods.terms import AtPairs
from laserrec.util.device import move
from laserrec.util.errors import UserError

_INSTRUCTION = ("### Instruction: Given the user's history in chronological order, recommend an item from the "
                "candidates by its letter.\n\n### Input:\nUser history:")
_CANDIDATES, _RESPONSE = "\nCandidates:", "\n\n### Response:\n"
_PROMPTS_AT_ONCE = 16
"""Prompts per pass of the LLM where nothing is trained."""


class Prompts:
    """The prompt's tokens; every piece is tokenised by itself. Raises UserError where a letter is no token."""

    def __init__(self, tokenizer: Any, config: LlamaRecConfig, items: pl.DataFrame):
        self.config = config
        titles_only = PromptConfig(attributes=(), max_item_tokens=config.title_tokens)
        self.titles = PromptEncoder(tokenizer, titles_only).item_tokens(items)

        def ids(text: str) -> np.ndarray:
            return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

        self._front, self._middle, self._end = (ids(text) for text in (_INSTRUCTION, _CANDIDATES, _RESPONSE))
        self._numbers = [ids(f"\n({n}) ") for n in range(1, config.max_history + 1)]
        letters = ascii_uppercase[: config.candidates]
        self._lettered = [ids(f"\n({letter}) ") for letter in letters]
        self.letters: list[int] = [int(ids(letter)[-1]) for letter in letters]
        """Token ids of A, B, ..."""
        if len(set(self.letters)) < len(letters):
            raise UserError("this LLM's tokenizer has no tokens of their own for the letters A to "
                            f"{letters[-1]}, by which llamarec ranks; take another backbone")

    def __call__(self, history: Sequence[int], candidates: Sequence[int]) -> Int[np.ndarray, "tokens"]:
        """Of item rows: the history, oldest first, and the candidates A, B, ..."""
        pieces = [self._front]
        for number, item in zip(self._numbers, history[-self.config.max_history :], strict=False):
            pieces += [number, self.titles[item]]
        pieces.append(self._middle)
        for letter, item in zip(self._lettered, candidates, strict=False):
            pieces += [letter, self.titles[item]]
        return np.concatenate([*pieces, self._end])

    def lengths(self, histories: Histories) -> Int[np.ndarray, "users"]:
        """Tokens of each history's prompt, with candidates of mean length."""
        each = torch.tensor([len(title) for title in self.titles])
        newest = histories.last(self.config.max_history)
        read = torch.zeros(len(histories), dtype=torch.long).index_add_(0, newest.users, each[newest.items] + 4)
        fixed = len(self._front) + len(self._middle) + len(self._end)
        return (read + fixed + int(self.config.candidates * (each.float().mean() + 4))).numpy()


class LowRank(nn.Module):
    """The low-rank updates of one layer's query and value maps. They start at zero.

    They read the layer's normalised input without the norm's scale, which the decoder folds into its own maps. Where
    the LLM normalises its queries (Qwen3), the update is added behind that norm.
    """

    scale: Tensor

    def __init__(self, config: LlamaRecConfig, shape: Shape):
        super().__init__()
        rank, bound = config.lora_rank, shape.d_llm**-0.5
        self.head_dim, self.kv_dim, self.dropout = shape.head_dim, shape.kv_dim, nn.Dropout(config.lora_dropout)
        self.q_down, self.v_down = (nn.Parameter(torch.empty(rank, shape.d_llm).uniform_(-bound, bound))
                                    for _ in range(2))
        self.q_up = nn.Parameter(torch.zeros(shape.heads * shape.head_dim, rank))
        self.v_up = nn.Parameter(torch.zeros(shape.kv_dim, rank))
        self.register_buffer("scale", torch.full((rank,), config.lora_alpha / rank))

    def forward(self, normed: Float[Tensor, "tokens d_llm"], qkv: Float[Tensor, "tokens all_heads head_dim"]
                ) -> Float[Tensor, "tokens all_heads head_dim"]:
        """Queries, keys and values with the updates."""
        x = self.dropout(normed.float())
        q, v = (F.linear(F.linear(x, down) * self.scale, up)
                for down, up in ((self.q_down, self.q_up), (self.v_down, self.v_up)))
        update = torch.cat([q, q.new_zeros(len(q), self.kv_dim), v], dim=1)
        return qkv + update.unflatten(1, (-1, self.head_dim)).to(qkv.dtype)


class LlamaRec(nn.Module, TwoTower):
    """A two-tower model, its retriever, and a score term, its ranker. The LLM is in no state_dict."""

    ranks: Tensor

    def __init__(self, config: Config, n_items: int, items: pl.DataFrame, backbone: Backbone):
        super().__init__()
        if not isinstance(backbone.decoder, NativeDecoder):
            raise UserError("llamarec needs the native decoder (Llama, Mistral, Qwen2, Qwen3) and backbone "
                            f"{backbone.name!r} runs on transformers'; take another backbone, or lrurec")
        self.config, self.backbone = config.llamarec, backbone
        self.prompts = Prompts(backbone.tokenizer, config.llamarec, items)
        self.retriever = LRURec(config.lrurec, n_items)
        self.lora = nn.ModuleList(LowRank(config.llamarec, backbone.decoder.shape) for _ in backbone.decoder.layers)
        self.register_buffer("ranks", torch.tensor(False))
        """Whether the ranker is used; False while the retriever is trained."""
        self.to(backbone.device)

    @property
    def terms(self) -> Sequence[ScoreTerm]:
        """The retriever's, and the ranker once it is trained."""
        return [*self.retriever.terms, self] if bool(self.ranks) else self.retriever.terms

    def users(self, histories: Histories) -> Float[Tensor, "users d_out"]:
        """The retriever's."""
        return self.retriever.users(histories)

    def items(self, rows: Int[Tensor, "some"] | None = None) -> Float[Tensor, "items d_out"]:
        """The retriever's."""
        return self.retriever.items(rows)

    @torch.no_grad()
    def score(self, histories: Histories) -> Float[Tensor, "users n_items"]:
        """The retriever's logits; those of the candidates are replaced by larger ones in the LLM's order."""
        scores = self.retriever.score(histories)
        return self._ranked(histories, scores).to_all(scores) if bool(self.ranks) else scores

    @torch.no_grad()
    def on(self, histories: Histories, users: Tensor | None = None) -> AtPairs:
        """As `ScoreTerm.on`: the candidates' new scores."""
        return self._ranked(histories, self.retriever.score(histories))

    def _ranked(self, histories: Histories, scores: Float[Tensor, "users n_items"]) -> AtPairs:
        best, rows = scores.topk(min(self.config.candidates, scores.shape[1]), dim=1)
        logits = self.letter_logits(histories, rows)
        place = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # ties keep the retriever's order
        values = best[:, :1] + (rows.shape[1] - place)
        rows, order = rows.sort(dim=1)
        users = torch.arange(len(rows), device=rows.device)[:, None].expand_as(rows)
        return AtPairs(Pairs(users.flatten(), rows.flatten()), values.gather(1, order).flatten(), lambda old, new: new)

    def letter_logits(self, histories: Histories, candidates: Int[Tensor, "users some"]
                      ) -> Float[Tensor, "users some"]:
        """The LLM's logits of the candidates' letters behind the prompt."""
        pairs = list(zip(histories.lists(), candidates.tolist(), strict=True))
        parts = [self._letters(pairs[at : at + _PROMPTS_AT_ONCE]) for at in range(0, len(pairs), _PROMPTS_AT_ONCE)]
        return torch.cat(parts) if parts else candidates.float()

    def _letters(self, pairs: list[tuple[list[int], list[int]]]) -> Float[Tensor, "prompts some"]:
        prompts = [self.prompts(*pair) for pair in pairs]
        tokens = self.backbone.tokens(np.concatenate(prompts))
        outputs = self._read(self.backbone.embed(tokens), [len(p) for p in prompts])
        letters = self.backbone.embed(self.backbone.tokens(self.prompts.letters[: len(pairs[0][1])]))
        return outputs @ letters.float().T

    def _read(self, embeds: Float[Tensor, "tokens d_llm"], lengths: list[int]) -> Float[Tensor, "prompts d_llm"]:
        """The LLM's output at the last token of each prompt."""
        decoder = self.backbone.decoder
        assert isinstance(decoder, NativeDecoder)  # another one is refused above
        layers: Any = decoder.layers
        delta: Any = None
        x, attention, last = embeds.to(decoder.dtype), decoder.packed(lengths), len(layers) - 1
        for i, (layer, update) in enumerate(zip(layers, self.lora, strict=True)):
            x, normed = layer.pointwise.add_norm(x, delta, decoder.shape.norm_eps)
            _, qkv = layer.project(x, None)
            x, delta = layer.rest(x, update(normed, qkv), attention, i, i == last)
        total = x.float() + delta.float()
        return F.rms_norm(total, total.shape[-1:], eps=decoder.shape.norm_eps) * decoder.final_norm

    def sizes(self) -> dict[str, int]:
        """llm_ranks: 1, or 0 where the retriever alone was better on validation, so that the model is the retriever."""
        return {"llm_ranks": int(self.ranks)}


class _KeepsAll(Trainable):
    """A task that trains a part of a LlamaRec and keeps the state of the whole."""

    model: LlamaRec

    def state(self) -> dict[str, Tensor]:
        """The whole model's."""
        return self.model.state_dict()

    def load(self, state: dict[str, Tensor]) -> None:
        """The whole model's."""
        self.model.load_state_dict(state)


class RetrieverTask(_KeepsAll, SequenceTask):
    """Trains the retriever of a LlamaRec."""

    def __init__(self, model: LlamaRec, dataset: Dataset):
        super().__init__(model.retriever, dataset)
        self.model = model


@dataclass(frozen=True)
class RankBatch:
    """Prompts whose answers are known."""

    histories: Histories
    candidates: Int[Tensor, "batch candidates"]
    answers: Int[Tensor, "batch"]
    """The place of each history's next item among its candidates."""


@dataclass(frozen=True)
class RankExamples:
    """One epoch's examples. The next item stands in a random place among random items that are not in the history, as
    in the authors' code; retrieved ones would give the answer away, since the retriever knows the training users."""

    sequences: Histories
    of: Int[Tensor, "examples"]
    cut: Int[Tensor, "examples"]
    lengths: Int[np.ndarray, "examples"]
    """Tokens, nearly."""
    n_items: int
    candidates: int

    def batch(self, index: Int[np.ndarray, "batch"]) -> RankBatch:
        """On the CPU; what is drawn here is the same in all processes."""
        histories, targets = cut_histories(self.sequences, self.of[index], self.cut[index])
        chance, rows = torch.rand(len(index), self.n_items), torch.arange(len(index))
        chance[histories.users, histories.items] -= 1  # drawn only where nothing else is left
        chance[rows, targets] = 2
        drawn = chance.topk(min(self.candidates, self.n_items), dim=1).indices
        drawn = drawn.gather(1, torch.rand(drawn.shape).argsort(dim=1))
        return RankBatch(histories, drawn, (drawn == targets[:, None]).long().argmax(dim=1))


class RankerTask(_KeepsAll):
    """Trains the low-rank updates."""

    def __init__(self, model: LlamaRec, dataset: Dataset):
        self.model, self.module, self.dataset = model, model.lora, dataset

    def start(self, pause: Any) -> None:
        """From now on the LLM ranks."""
        self.model.ranks.fill_(True)

    def begin_epoch(self, number: int) -> RankExamples:
        """Every position that has a history, or some of them."""
        self.model.eval()
        self.module.train()
        config, sequences = self.model.config, self.dataset.train_sequences
        of, cut = epoch_examples(sequences, Cuts.ALL, (config.seed, 2, number), config.epoch_examples)
        lengths = self.model.prompts.lengths(cut_histories(sequences, of, cut)[0])
        return RankExamples(sequences, of, cut, lengths, self.dataset.n_items, config.candidates)

    def loss(self, batch: RankBatch, rows: Int[np.ndarray, "some"]) -> dict[str, Tensor]:
        """Cross-entropy over the letters, the rows' share of the batch's mean."""
        logits = self.model.letter_logits(batch.histories.take(rows), batch.candidates[torch.as_tensor(rows)])
        answers = move(batch.answers[torch.as_tensor(rows)], logits.device)
        return {"loss": F.cross_entropy(logits, answers, reduction="sum") / len(batch.answers)}

    def scorer(self) -> LlamaRec:
        """Without dropout."""
        return self.model.eval()


def phases(model: LlamaRec, config: Config, dataset: Dataset) -> list[Phase]:
    """The retriever, then the ranker. An epoch of the ranker is kept only if it is better on validation than the
    retriever alone."""
    own = config.llamarec
    ranker = Phase("ranker", RankerTask(model, dataset), own.max_epochs, own.batch_size, own.lr, own.weight_decay,
                   tokens_per_pass=config.train.tokens_per_pass, patience=own.patience, eval_every=own.eval_every)
    return [retriever_phase(config.lrurec, RetrieverTask(model, dataset), "retriever"), ranker]


def shapes(config: Config, n_known: int) -> dict[str, tuple[int, ...]]:
    """Of the largest weights, as far as the settings alone tell them."""
    return {**retriever_shapes(config.lrurec, n_known, "retriever."), "lora.0.scale": (config.llamarec.lora_rank,)}
