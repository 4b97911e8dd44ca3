"""Every setting of laserrec in one frozen tree.

A config is built from a preset, then a TOML file, then single overrides (`--train.lr 1e-3`); unknown names are
errors. Symbols in brackets are the paper's (Zhang et al. 2024, "Laser"); a default that differs from the paper says so.
"""

from __future__ import annotations

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from laserrec.util.errors import UserError

_S = TypeVar("_S", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Split(StrEnum):
    LEAVE_ONE_OUT = "leave_one_out"
    TEMPORAL = "temporal"


class DataConfig(_Section):
    """How raw files become a data folder (`laserrec prepare`)."""

    min_user_interactions: int = Field(5, ge=1)
    """k-core: users with fewer interactions are dropped (repeated until nothing changes)."""
    min_item_interactions: int = Field(5, ge=1)
    """k-core: items with fewer interactions are dropped (repeated until nothing changes)."""
    drop_untitled: bool = True
    """Drop items without a title, and their interactions, before the k-core. (The paper drops them too, from data that
    are 5-core already: 4.1.1.)"""
    drop_duplicates: bool = True
    """Keep one of several interactions with equal (user, item, timestamp)."""
    split: Split = Split.LEAVE_ONE_OUT
    """leave_one_out: last item = test, one before = validation (paper, 4.1.3). temporal: two global points in time."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """temporal only: share of all interactions, by time, that is validation."""
    test_fraction: float = Field(0.1, gt=0, lt=1)
    """temporal only: share of all interactions, by time, that is test."""


class IdModelKind(StrEnum):
    SASREC = "sasrec"
    BERT4REC = "bert4rec"
    NONE = "none"


class IdLoss(StrEnum):
    CROSS_ENTROPY = "cross_entropy"
    BCE = "bce"


class ItemTable(StrEnum):
    IDS = "ids"
    LLM_START = "llm_start"
    TEXT = "text"


class IdModelConfig(_Section):
    """The ID-based sequential recommender that is pretrained, frozen and read by the M-Former."""

    kind: IdModelKind = IdModelKind.SASREC
    """sasrec (causal, next item), bert4rec (bidirectional, cloze; the paper's), or none: Laser without an ID model."""
    d_id: int = Field(128, ge=2)
    """Width of the states C_u [d_i]; the paper's BERT4Rec has 64."""
    blocks: int = Field(2, ge=1)
    """Transformer blocks."""
    heads: int = Field(2, ge=1)
    """Attention heads."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout on embeddings, attention output and feed-forward output."""
    max_history: int = Field(50, ge=2)
    """Window: only the last so many items are read."""
    loss: IdLoss = IdLoss.CROSS_ENTROPY
    """cross_entropy: full softmax over all items. bce: one sampled negative per positive (sasrec only)."""
    items: ItemTable = ItemTable.IDS
    """ids: a free vector per item (paper). llm_start: the same, started from the frozen LLM's item embeddings, whitened
    and cut to d_id dimensions. text: no free vectors, a linear map of those embeddings (the text model that others call
    UniSRec, without its pretraining on other data)."""
    seen_offset: bool = False
    """Learn one number that is added to the logits of items which stand in the history already."""
    shuffle: float = Field(0.0, ge=0, le=1)
    """Share of the training sequences that are read in a random order each epoch. Where order says little this makes
    many sequences of few."""
    mask_probability: float = Field(0.2, gt=0, lt=1)
    """bert4rec: share of the items that the cloze task hides."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    batch_size: int = Field(128, ge=1)
    """Users per step."""
    max_epochs: int = Field(200, ge=1)
    """Upper bound; early stopping on validation NDCG@10 normally ends it before."""
    patience: int = Field(10, ge=1)
    """Stop after so many evaluations without a better validation NDCG@10."""
    eval_every: int = Field(1, ge=1)
    """Epochs between two looks at validation."""
    seed: int = 0
    """Seed of initialisation, order, dropout and masking."""

    @model_validator(mode="after")
    def _heads_divide(self) -> IdModelConfig:
        if self.d_id % self.heads:
            raise ValueError(f"d_id {self.d_id} is not a multiple of heads {self.heads}")
        if self.loss == IdLoss.BCE and self.kind != IdModelKind.SASREC:
            raise ValueError("loss 'bce' is for kind 'sasrec'; bert4rec's cloze task uses 'cross_entropy'")
        if self.loss == IdLoss.BCE and self.seen_offset:
            raise ValueError("seen_offset needs loss 'cross_entropy': 'bce' compares two items at a time")
        return self


class Precision(StrEnum):
    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


class Engine(StrEnum):
    AUTO = "auto"
    NATIVE = "native"
    TRANSFORMERS = "transformers"


class Quantization(StrEnum):
    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"


class BackboneConfig(_Section):
    """The frozen decoder LLM."""

    name: str = "smollm2-135m"
    """`smollm2-135m` (embedded default), a Hugging Face id, or a local folder."""
    revision: str | None = None
    """Commit or tag of a Hugging Face id."""
    layers: int | None = Field(None, ge=1)
    """Use only the first so many layers; None = all (paper)."""
    mean_layers: tuple[int, ...] = ()
    """Layers behind which an item text's outputs are averaged (prompt.item_side mean, neighbours, text-aware ID
    models), their vectors side by side; none: behind the last of `layers`. Layers that no history is read with may be
    among them: item texts are read once."""
    precision: Precision = Precision.AUTO
    """auto times bf16 against fp32 on this machine once and takes the faster."""
    engine: Engine = Engine.AUTO
    """native: laserrec's own forward for the Llama family; transformers: any decoder; auto: native where it can."""
    compiled: bool = False
    """native only: fuse the pointwise steps with torch.compile (needs a C++ compiler; some seconds at the first use,
    kept on disk between runs)."""
    gradient_checkpointing: bool = False
    """Keep one tensor per layer for the backward pass and compute the rest again: less memory, about a third more
    time."""
    quantization: Quantization = Quantization.NONE
    """int8 or int4 weights (extra `quant`) on transformers' own forward, for backbones that don't fit otherwise."""
    shard: bool = False
    """Under torchrun each process holds a part of the weights (FSDP, on transformers' own forward), for backbones that
    are too large for one; needs prompt.layout prefix_first. One process alone holds all."""

    @model_validator(mode="before")
    @classmethod
    def _no_file_allows_code(cls, tree: Any) -> Any:
        """Folders of version 0.1 name trust_remote_code; off, it is what they get anyway."""
        if not isinstance(tree, dict) or "trust_remote_code" not in tree:
            return tree
        if tree["trust_remote_code"]:
            raise ValueError("trust_remote_code is not a setting, so that no file can allow code to run. If you trust "
                             "the LLM's source, load it with laserrec.llm.backbone.load_backbone(..., "
                             "trust_remote_code=True) and hand over what that returns")
        return {name: value for name, value in tree.items() if name != "trust_remote_code"}

    @model_validator(mode="after")
    def _mean_layers_ascend(self) -> BackboneConfig:
        if list(self.mean_layers) != sorted(set(self.mean_layers)) or min(self.mean_layers, default=1) < 1:
            raise ValueError(f"mean_layers must ascend from 1 or more; given {list(self.mean_layers)}")
        if self.shard and self.mean_layers:
            raise ValueError("shard reads one depth only; add --backbone.empty-mean-layers")
        return self

    @model_validator(mode="after")
    def _shards_are_plain(self) -> BackboneConfig:
        if self.shard and self.engine == Engine.NATIVE:
            raise ValueError("shard runs on transformers' forward; leave engine at auto")
        if self.shard and self.quantization != Quantization.NONE:
            raise ValueError("shard and quantization are two ways to hold a large backbone; choose one")
        return self


class Template(StrEnum):
    PAPER = "paper"
    NO_SINGLE_TOKEN = "no_single_token"
    NO_INSTRUCTION = "no_instruction"
    ITEM_INSTRUCTION = "item_instruction"


class Layout(StrEnum):
    PREFIX_FIRST = "prefix_first"
    TEXT_FIRST = "text_first"
    NONE = "none"


class ItemSide(StrEnum):
    TRAINED = "trained"
    PLAIN = "plain"
    MEAN = "mean"


class PromptConfig(_Section):
    """The text of a history and where the trained tokens stand."""

    template: Template = Template.PAPER
    """paper, or a variant of Table 6: no_single_token (1), no_instruction (2), item_instruction (3)."""
    layout: Layout = Layout.PREFIX_FIRST
    """prefix_first: [prefix][text][suffix] (paper, Eq. 1). text_first (not in the paper):
    [text][prefix][suffix], where each item's text attends to itself and the instruction only, so that the frozen
    LLM reads every item once and its keys and values are reused for all users and epochs. none (not in the paper):
    the LLM reads items alone, no histories; needs item_side mean."""
    item_side: ItemSide = ItemSide.TRAINED
    """trained: an item is read with the same prefix and suffix as a user (paper). plain (not in the paper): with no
    prefix and a frozen [EOS] as suffix, so that users train against a target that stands still. mean (not in the
    paper): an item is the mean of the LLM's outputs over its own text, and a user starts as the sum of the history's
    items, newer ones heavier (neighbours.decay), to which a trained map adds the output at the suffix."""
    max_items: int = Field(20, ge=1)
    """Only the last so many items of a history are written out."""
    max_item_tokens: int = Field(64, ge=4)
    """Tokens per item line; a longer line is cut at its end."""
    attributes: tuple[str, ...] = ("brand", "category")
    """Item columns written in brackets after the title."""

    @model_validator(mode="after")
    def _shared_text_has_one_instruction(self) -> PromptConfig:
        if self.layout == Layout.TEXT_FIRST and self.template == Template.ITEM_INSTRUCTION:
            raise ValueError("template item_instruction needs layout prefix_first: with text_first users and items "
                             "share one reading of the text")
        return self


class Prefix(StrEnum):
    MFORMER = "mformer"
    ONE_EXPERT = "one_expert"
    LEARNED = "learned"
    NONE = "none"


class Routing(StrEnum):
    HARD = "hard"
    GATE_SCALED = "gate_scaled"


class MFormerConfig(_Section):
    """The MoE-based querying transformer that makes the prefix (paper, 3.2)."""

    prefix: Prefix = Prefix.MFORMER
    """mformer; one_expert (Table 4 w/o MoE); learned (w/o M-Former: a free prefix); none (w/o prefix)."""
    experts: int = Field(8, ge=1)
    """Query experts [K]."""
    queries: int = Field(32, ge=1)
    """Virtual tokens per expert = prefix length [L]."""
    blocks: int = Field(12, ge=1)
    """Transformer blocks [Z]; every other one (first, third ...) cross-attends to the ID states."""
    d_model: int = Field(768, ge=2)
    """Width of the virtual tokens [d_m]."""
    heads: int = Field(12, ge=1)
    """Attention heads."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout inside the blocks."""
    routing: Routing = Routing.HARD
    """hard: argmax only, the router learns from the balance loss alone (paper). gate_scaled: the chosen expert's
    tokens are multiplied by gate / stop_gradient(gate), which gives the router the task's gradient."""
    zero_init: bool = False
    """Start the projection's weight at zero, so that the prefix starts as a constant (not in the paper)."""
    state_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of training examples whose ID states are hidden, which prepares for items the ID model never saw."""

    @model_validator(mode="after")
    def _heads_divide(self) -> MFormerConfig:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        return self


class Pooling(StrEnum):
    SUFFIX = "suffix"
    MEAN = "mean"
    EOS = "eos"


class HeadConfig(_Section):
    """From the LLM's outputs to an embedding."""

    pooling: Pooling = Pooling.SUFFIX
    """suffix: output at the trained last token (paper); mean: over text outputs; eos: a frozen [EOS] (Table 5)."""
    suffix_from_eos: bool = False
    """Start the suffix as the LLM's [EOS] embedding instead of at random (not in the paper)."""
    whiten_dims: int = Field(0, ge=0)
    """0: the LLM's output as it is (paper). n: centre and whiten to n dimensions with the covariance of the
    untrained items' outputs, computed once before training and frozen."""
    projection: bool = False
    """A trained linear map behind the (whitened) output, started as the identity (not in the paper)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the projection's input."""
    id_share: float = Field(0.0, ge=0, lt=1)
    """0: the LLM's output alone (paper). Else the frozen ID model's user state / item embedding stands beside it and
    the score is (1 - id_share) x LLM cosine + id_share x ID cosine. The training loss sees the LLM's part alone: the
    ID model has seen the training targets, so a mix weighed on them would trust it too much."""
    seen_offset: bool = False
    """Learn one number that is added to the scores of items which stand in the user's history already (not in the
    paper). They are the nearest by text, and how often people buy again differs between shops."""
    seen_offset_start: float = -1.0
    """Where that number starts: a cosine less, since most people buy something new."""


class NeighboursConfig(_Section):
    """Item-to-item regression on training sequences and texts that stands beside the embeddings (not in the paper;
    laserrec.methods.neighbours). An item that the history's items pull scores higher than its cosine."""

    count: int = Field(0, ge=0)
    """Neighbours that are kept per item; 0: none, scores are cosines (paper)."""
    l2: float = Field(200.0, gt=0)
    """Ridge penalty on the regression's weights."""
    text_weight: float = Field(4.0, ge=0)
    """Weight of the items' text vectors beside the sequences; 0: IDs alone."""
    length_power: float = Field(0.5, ge=0)
    """A sequence of n items weighs n ** -length_power: long ones don't outweigh the many short ones."""
    row_power: float = Field(0.0, ge=0, le=1)
    """An item's weights are divided by (their positive ones' sum / the items' mean) ** row_power: with 1 all items say
    as much."""
    decay: float = Field(0.8, gt=0, le=1)
    """What an item of a history weighs beside the next newer one."""
    share: float = Field(0.7, gt=0)
    """What the softmax over cosines weighs beside the neighbours."""
    temperature: float = Field(0.1, gt=0)
    """Of that softmax [tau of the join]; the loss has its own."""


class Cuts(StrEnum):
    ALL = "all"
    RANDOM = "random"


class TrainConfig(_Section):
    """Fitting Laser's trainable parts in two stages (paper, 3.3)."""

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of Adam."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay of the linear maps' weights; 0 is Adam (paper)."""
    warmup_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of stage 1's steps in which the rate rises linearly from zero."""
    cosine_decay: bool = False
    """Let the rate fall to zero along a cosine within each stage (not in the paper)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    batch_size: int = Field(4, ge=1)
    """Examples per step."""
    stage_one_epochs: int = Field(15, ge=0)
    """Epochs with items re-encoded at the start of each; the best epoch on validation is kept. 0: no stage 1."""
    stage_two_epochs: int = Field(5, ge=0)
    """Epochs against the best epoch's fixed item embeddings. 0: no stage 2."""
    tokens_per_pass: int = Field(2048, ge=1)
    """prefix_first: a step's batch goes through the LLM in passes of about so many tokens, whose gradients add up to
    the whole batch's; bounds the memory of a step."""
    cuts: Cuts = Cuts.ALL
    """all: every position of a training sequence is a target each epoch (paper); random: one per user and epoch."""
    item_gradient: bool = False
    """Stage 1: items pass the head anew at every step, with gradient to it; their LLM outputs stay the epoch's (not
    in the paper, where an epoch's item embeddings are fixed)."""
    history_negatives: bool = True
    """True: the softmax runs over all items (paper). False: the history's own items are no negatives. They are the
    nearest by text and almost never the target, so that pushing them away costs the text match (not in the paper;
    without effect where head.seen_offset does the pushing)."""
    temperature: float = Field(0.05, gt=0)
    """Softmax temperature [tau]."""
    learn_temperature: bool = False
    """Train the temperature beside the rest, from `temperature` on (not in the paper)."""
    balance_weight: float = Field(0.01, ge=0)
    """Weight of the load-balancing loss [lambda]."""
    validation_users: int | None = Field(None, ge=1)
    """Choose the epoch on so many randomly drawn validation users; None = all."""
    checkpoint_minutes: float = Field(5.0, gt=0)
    """Minutes between two resumable checkpoints."""
    seed: int = 0
    """Seed of initialisation, order, cuts and dropout."""


class EvalConfig(_Section):
    """The one evaluator."""

    k: int = Field(10, ge=1)
    """Cut-off of Recall@k and NDCG@k."""
    batch_size: int = Field(64, ge=1)
    """Users encoded and ranked at once."""
    validates: bool = True
    """Choose the epoch on validation. False: train all epochs and keep the last, for data too small to validate on."""


class StudentConfig(_Section):
    """Distilling a fitted model (laserrec.recommender.distil). Not in the paper, and no part of `Config`: a student is
    made of a model that is fitted already."""

    hidden: int = Field(512, ge=1)
    """Width of the hidden layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """On its input and its output."""
    views: int = Field(3, ge=0)
    """Histories that are drawn of each training sequence, beside the whole one: beginnings and parts, in turn."""
    histories: int = Field(50_000, ge=1)
    """At most so many are read by the LLM; of more a random part is drawn."""
    epochs: int = Field(3, ge=1)
    """Passes over them."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW; it rises over 50 steps and falls to zero along a cosine."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's decoupled weight decay."""
    batch_size: int = Field(128, ge=1)
    """Histories per step."""
    seed: int = 0
    """Seed of histories, initialisation, order and dropout."""


class Config(_Section):
    """The whole tree."""

    data: DataConfig = DataConfig()
    id_model: IdModelConfig = IdModelConfig()
    backbone: BackboneConfig = BackboneConfig()
    prompt: PromptConfig = PromptConfig()
    mformer: MFormerConfig = MFormerConfig()
    head: HeadConfig = HeadConfig()
    neighbours: NeighboursConfig = NeighboursConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    student: StudentConfig | None = None
    """Of a distilled model alone; set by `laserrec distil`."""

    @model_validator(mode="after")
    def _layout_fits(self) -> Config:
        if self.prompt.layout == Layout.TEXT_FIRST and self.head.pooling == Pooling.MEAN:
            raise ValueError("head.pooling mean needs prompt.layout prefix_first: text_first keeps no text outputs")
        reads = self.prompt.layout != Layout.NONE
        if self.prompt.item_side == ItemSide.MEAN and reads and not self.head.projection:
            raise ValueError("prompt.item_side mean needs head.projection: it maps items and the history's sum alike")
        if not reads and self.prompt.item_side != ItemSide.MEAN:
            raise ValueError("prompt.layout none needs prompt.item_side mean: without a pass over histories users are "
                             "sums of items")
        if not reads and not self.head.projection and self.train.stage_one_epochs + self.train.stage_two_epochs:
            raise ValueError("prompt.layout none without head.projection has nothing to train; set "
                             "train.stage_one_epochs and train.stage_two_epochs to 0")
        if self.prompt.layout == Layout.TEXT_FIRST and self.backbone.shard:
            raise ValueError("backbone.shard needs prompt.layout prefix_first: text_first needs the native engine")
        return self


def load_config(preset: str = "small", file: Path | None = None, overrides: dict[str, Any] | None = None,
                method: str = "laser") -> Config:
    """Preset, then TOML file, then overrides (nested dicts); later ones win.

    method: what is to be fitted; the settings that did best for it alone are laid on the preset.
    Raises UserError with the file and the setting's dotted name for anything unknown or out of range.
    """
    from laserrec.presets import METHOD_SETTINGS, PRESETS

    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; there are: {', '.join(PRESETS)}")
    tree = merge(PRESETS[preset], METHOD_SETTINGS.get(method, {}))
    source = f"preset {preset}"
    if file is not None:
        tree = merge(tree, _read_toml(file))
        source = str(file)
    return valid(Config, merge(tree, overrides or {}), f"{source} with overrides")


def valid(kind: type[_S], tree: dict[str, Any], source: str) -> _S:
    """Settings from a nested dict. Raises UserError with each setting's dotted name, what is wrong and the source."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r})" for e in error.errors()]
        raise UserError(f"settings are not valid ({source}): " + "; ".join(lines)) from None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, nested tables merged; neither is changed."""
    out = dict(base)
    for key, value in over.items():
        inner = out.get(key)
        out[key] = merge(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return out


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such config file: {file}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}") from None
