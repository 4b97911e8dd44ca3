"""All settings of laserrec, in one frozen tree.

A config is built from a preset, then a TOML file, then single overrides (`--train.lr 1e-3`); later ones win and unknown
names are errors. Symbols in brackets are those of the paper (Zhang et al. 2024, "Laser"). "Not in the paper" marks
options that we added.
"""

from __future__ import annotations

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from laserrec.util.errors import UserError, reading

_S = TypeVar("_S", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Split(StrEnum):
    """How interactions are split into training, validation and test."""

    LEAVE_ONE_OUT = "leave_one_out"
    TEMPORAL = "temporal"


class DataConfig(_Section):
    """How raw files become a data folder (`laserrec prepare`)."""

    min_user_interactions: int = Field(5, ge=1)
    """k-core filter: drop users with fewer interactions. Users and items are filtered in turn until nothing changes."""
    min_item_interactions: int = Field(5, ge=1)
    """k-core filter: drop items with fewer interactions. Users and items are filtered in turn until nothing changes."""
    drop_untitled: bool = True
    """Drop items without a title, and their interactions, before the k-core filter. The paper drops them after it
    (4.1.1)."""
    drop_duplicates: bool = True
    """Keep one of several interactions with the same user, item and timestamp."""
    split: Split = Split.LEAVE_ONE_OUT
    """leave_one_out: each user's last item is test, the one before it validation (paper, 4.1.3). temporal: two cut-off
    times, the same for all users."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """temporal only: share of all interactions that falls between the two cut-off times."""
    test_fraction: float = Field(0.1, gt=0, lt=1)
    """temporal only: share of all interactions that comes after the second cut-off time."""


class IdModelKind(StrEnum):
    """Architecture of the ID model."""

    SASREC = "sasrec"
    BERT4REC = "bert4rec"
    NONE = "none"


class IdLoss(StrEnum):
    """Training loss of the ID model."""

    CROSS_ENTROPY = "cross_entropy"
    BCE = "bce"


class ItemTable(StrEnum):
    """Where the ID model's item embeddings come from."""

    IDS = "ids"
    LLM_START = "llm_start"
    TEXT = "text"


class IdModelConfig(_Section):
    """The ID model: a sequential recommender that is trained first and then frozen. The M-Former reads its states."""

    kind: IdModelKind = IdModelKind.SASREC
    """sasrec: causal attention, predicts the next item. bert4rec: bidirectional attention, predicts masked items (used
    by the paper). none: Laser without an ID model."""
    d_id: int = Field(128, ge=2)
    """Width of the hidden states [C_u, d_i]. The paper's BERT4Rec has 64."""
    blocks: int = Field(2, ge=1)
    """Transformer blocks."""
    heads: int = Field(2, ge=1)
    """Attention heads."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout on embeddings, attention output and feed-forward output."""
    max_history: int = Field(50, ge=2)
    """Number of most recent items that the model reads."""
    loss: IdLoss = IdLoss.CROSS_ENTROPY
    """cross_entropy: full softmax over all items. bce: one sampled negative per positive (sasrec only)."""
    items: ItemTable = ItemTable.IDS
    """ids: one trained vector per item, random at first (paper). llm_start: one trained vector per item that starts as
    the item's embedding from the frozen LLM, whitened to d_id dimensions. text: no trained vectors, only a trained
    linear map of the LLM's item embeddings (UniSRec's design, without its pretraining on other data)."""
    seen_offset: bool = False
    """Learn one number that is added to the logits of all items in the user's history."""
    shuffle: float = Field(0.0, ge=0, le=1)
    """Share of the training sequences whose order is shuffled in each epoch: data augmentation for data where the order
    carries little information."""
    mask_probability: float = Field(0.2, gt=0, lt=1)
    """bert4rec only: share of the items that are masked."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    batch_size: int = Field(128, ge=1)
    """Users per training step."""
    max_epochs: int = Field(200, ge=1)
    """Upper bound on the epochs. Early stopping on validation NDCG@10 usually ends training before."""
    patience: int = Field(10, ge=1)
    """Stop after this many evaluations without a better validation NDCG@10."""
    eval_every: int = Field(1, ge=1)
    """Epochs between two evaluations on validation."""
    seed: int = 0
    """Random seed for initialisation, batch order, dropout and masking."""

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
    """Number format of the frozen LLM's weights and outputs."""

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


class Engine(StrEnum):
    """Implementation of the LLM's forward pass."""

    AUTO = "auto"
    NATIVE = "native"
    TRANSFORMERS = "transformers"


class Quantization(StrEnum):
    """Quantisation of the LLM's weights."""

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"


class BackboneConfig(_Section):
    """The frozen decoder LLM (the backbone)."""

    name: str = "smollm2-135m"
    """`smollm2-135m` (the default, installed through the package index), a Hugging Face id, or a local folder."""
    revision: str | None = None
    """Commit, branch or tag, where `name` is a Hugging Face id."""
    layers: int | None = Field(None, ge=1)
    """Use only this many of the first layers; none: all (paper)."""
    mean_layers: tuple[int, ...] = ()
    """Layers whose outputs are averaged over an item's text to make its text vector; the averages of all these layers
    are concatenated. Used by prompt.item_side mean, neighbours and the text-based ID models. Empty: the last of
    `layers`. Values above `layers` are allowed and cheap, since each item text is read only once."""
    precision: Precision = Precision.AUTO
    """auto: measure bf16 and fp32 once on this machine and use the faster."""
    engine: Engine = Engine.AUTO
    """native: laserrec's own forward pass, for the Llama family. transformers: any decoder. auto: native where it
    supports the model."""
    compiled: bool = False
    """native only: fuse pointwise operations with torch.compile. Needs a C++ compiler; compiling takes some seconds at
    first use and is cached on disk."""
    gradient_checkpointing: bool = False
    """Keep one tensor per layer for the backward pass and recompute the rest: less memory, about a third more time."""
    quantization: Quantization = Quantization.NONE
    """int8 or int4 weights, for backbones that do not fit otherwise. Needs the extra `quant` and runs on transformers'
    forward pass."""
    shard: bool = False
    """Under torchrun, split the weights over the processes (FSDP), for backbones that are too large for one. Runs on
    transformers' forward pass and needs prompt.layout prefix_first. No effect with a single process."""

    @model_validator(mode="before")
    @classmethod
    def _no_file_allows_code(cls, tree: Any) -> Any:
        """Accept folders of version 0.1, which have trust_remote_code among the settings, if it is off there."""
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
            raise ValueError("shard reads one depth only; set mean_layers = [] under [backbone] in a TOML file")
        return self

    @model_validator(mode="after")
    def _shards_are_plain(self) -> BackboneConfig:
        if self.shard and self.engine == Engine.NATIVE:
            raise ValueError("shard runs on transformers' forward; leave engine at auto")
        if self.shard and self.quantization != Quantization.NONE:
            raise ValueError("shard and quantization are two ways to hold a large backbone; choose one")
        return self


class Template(StrEnum):
    """Wording of the prompt."""

    PAPER = "paper"
    NO_SINGLE_TOKEN = "no_single_token"
    NO_INSTRUCTION = "no_instruction"
    ITEM_INSTRUCTION = "item_instruction"


class Layout(StrEnum):
    """Order of prefix and text in the prompt."""

    PREFIX_FIRST = "prefix_first"
    TEXT_FIRST = "text_first"
    NONE = "none"


class ItemSide(StrEnum):
    """How items are embedded."""

    TRAINED = "trained"
    PLAIN = "plain"
    MEAN = "mean"


class PromptConfig(_Section):
    """The prompt: how a history is written as text, and where the trained tokens go."""

    template: Template = Template.PAPER
    """paper: the template of the paper. no_single_token, no_instruction and item_instruction: variants 1 to 3 of
    Table 6."""
    layout: Layout = Layout.PREFIX_FIRST
    """prefix_first: [prefix][text][suffix] (paper, Eq. 1). text_first (not in the paper): [text][prefix][suffix], where
    each item's text attends only to itself and the instruction. The LLM then reads each item once, and the item's keys
    and values are reused for all users and epochs. none (not in the paper): the LLM reads items but no histories; needs
    item_side mean."""
    item_side: ItemSide = ItemSide.TRAINED
    """trained: an item is embedded with the same prefix and suffix as a user (paper). plain (not in the paper): with no
    prefix and a frozen [EOS] as suffix, so that the targets do not move while users are trained. mean (not in the
    paper): an item is the average of the LLM's outputs over its text; a user is the sum of the history's items, recent
    items weighted more (prompt.decay), plus a trained linear map of the output at the suffix."""
    max_items: int = Field(20, ge=1)
    """Number of most recent items that are written into the prompt."""
    max_item_tokens: int = Field(64, ge=4)
    """Maximum tokens per item; longer texts are truncated at the end."""
    decay: float = Field(0.8, gt=0, le=1)
    """item_side mean only: weight of a history item in the sum relative to the next newer one."""
    attributes: tuple[str, ...] = ("brand", "category")
    """Item columns that are written in brackets after the title."""

    @model_validator(mode="after")
    def _shared_text_has_one_instruction(self) -> PromptConfig:
        if self.layout == Layout.TEXT_FIRST and self.template == Template.ITEM_INSTRUCTION:
            raise ValueError("template item_instruction needs layout prefix_first: with text_first users and items "
                             "share one reading of the text")
        return self


class Prefix(StrEnum):
    """How the prefix is made."""

    MFORMER = "mformer"
    ONE_EXPERT = "one_expert"
    LEARNED = "learned"
    NONE = "none"


class Routing(StrEnum):
    """How the router is trained."""

    HARD = "hard"
    GATE_SCALED = "gate_scaled"


class MFormerConfig(_Section):
    """The M-Former: a querying transformer with a mixture of query experts, which makes the prefix (paper, 3.2)."""

    prefix: Prefix = Prefix.MFORMER
    """mformer: the full model. The ablations of Table 4: one_expert (w/o MoE), learned (one trained prefix for all
    users, w/o M-Former) and none (w/o prefix)."""
    experts: int = Field(8, ge=1)
    """Number of query experts [K]."""
    queries: int = Field(32, ge=1)
    """Query vectors per expert, which is also the length of the prefix in tokens [L]."""
    blocks: int = Field(12, ge=1)
    """Transformer blocks [Z]. Every second one, from the first on, cross-attends to the ID model's states."""
    d_model: int = Field(768, ge=2)
    """Width of the query vectors [d_m]."""
    heads: int = Field(12, ge=1)
    """Attention heads."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout inside the transformer blocks."""
    routing: Routing = Routing.HARD
    """hard: the best expert is taken and the router is trained by the balance loss alone (paper). gate_scaled: the
    chosen expert's tokens are multiplied by gate / stop_gradient(gate), so that the recommendation loss trains the
    router too."""
    zero_init: bool = False
    """Initialise the output projection's weight with zeros, so that at first all users have the same prefix (not in the
    paper)."""
    state_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the training examples whose ID states are hidden, as they are for items that the ID model does not
    know."""

    @model_validator(mode="after")
    def _heads_divide(self) -> MFormerConfig:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        return self


class Pooling(StrEnum):
    """Which LLM outputs make the embedding."""

    SUFFIX = "suffix"
    MEAN = "mean"
    EOS = "eos"


class HeadConfig(_Section):
    """The head: from the LLM's outputs to an embedding."""

    pooling: Pooling = Pooling.SUFFIX
    """suffix: the output at the trained last token (paper). mean: the average over the text's outputs. eos: the output
    at a frozen [EOS] token. The last two are the variants of Table 5."""
    suffix_from_eos: bool = False
    """Initialise the suffix with the LLM's [EOS] embedding instead of at random (not in the paper)."""
    whiten_dims: int = Field(0, ge=0)
    """0: use the LLM's output as it is (paper). n: centre it and whiten it to n dimensions (PCA whitening, not in the
    paper). Mean and covariance are computed once over all items, before training."""
    projection: bool = False
    """Add a trained linear map after the whitening, initialised as the identity (not in the paper)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the projection."""
    id_share: float = Field(0.0, ge=0, lt=1)
    """Weight of the ID model's own cosine in the score: (1 - id_share) x LLM cosine + id_share x ID cosine. 0: the LLM
    cosine alone (paper). The training loss uses the LLM cosine alone, because the ID model has already been trained on
    the same targets and the mixture would rely on it too much."""
    seen_offset: bool = False
    """Learn one number that is added to the scores of all items in the user's history (not in the paper). Those items
    are the closest by text, while the rate of repeat purchases differs from shop to shop."""
    seen_offset_start: float = -1.0
    """Initial value of that number. Negative, since most people buy something new."""


class NeighboursConfig(_Section):
    """Closed-form item-to-item regression (EASE) on training sequences and item texts (not in the paper). Each pair of
    items gets a neighbour weight; items with high weights to the history's items get a score boost on top of their
    cosine. Method and sources: laserrec.methods.neighbours."""

    count: int = Field(0, ge=0)
    """Number of neighbours kept per item. 0: no neighbours, the score is the cosine (paper)."""
    l2: float = Field(200.0, gt=0)
    """L2 (ridge) penalty of the regression."""
    text_weight: float = Field(4.0, ge=0)
    """Weight of the item texts relative to the training sequences in the regression. 0: sequences alone."""
    length_power: float = Field(0.5, ge=0)
    """Sequences of n distinct items are weighted by n ** -length_power, so that long ones do not dominate. 0: all
    sequences weigh the same."""
    row_power: float = Field(0.0, ge=0, le=1)
    """Normalisation of the neighbour weights per history item: they are divided by their sum ** row_power, with the
    sum relative to the mean over items. 0: none. 1: every history item gives the same total boost."""
    decay: float = Field(0.8, gt=0, le=1)
    """Decay per step back in time: the weight of a history item relative to the next newer one. 1: no decay."""
    share: float = Field(0.7, gt=0)
    """Weight of the cosines relative to the neighbours. Higher values make the score boost smaller."""
    temperature: float = Field(0.1, gt=0)
    """Softmax temperature at which cosines and neighbour weights are combined. The training loss has its own,
    train.temperature."""


class Cuts(StrEnum):
    """Which positions of a training sequence are targets."""

    ALL = "all"
    RANDOM = "random"


class TrainConfig(_Section):
    """Training of Laser in two stages (paper, 3.3)."""

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay, applied to the weights of linear layers only. 0: Adam (paper)."""
    warmup_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of stage 1's steps during which the learning rate rises linearly from zero."""
    cosine_decay: bool = False
    """Let the learning rate fall to zero along a cosine within each stage (not in the paper)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip gradients to this norm."""
    batch_size: int = Field(4, ge=1)
    """Examples per training step."""
    stage_one_epochs: int = Field(15, ge=0)
    """Epochs of stage 1, which recomputes the item embeddings in every epoch. The best epoch on validation is kept. 0:
    no stage 1."""
    stage_two_epochs: int = Field(5, ge=0)
    """Epochs of stage 2, which continues from the best epoch with its item embeddings fixed. 0: no stage 2."""
    tokens_per_pass: int = Field(2048, ge=1)
    """prefix_first only: split each batch into passes of about this many tokens through the LLM and add up their
    gradients. Limits memory and does not change the result."""
    cuts: Cuts = Cuts.ALL
    """all: every position of a training sequence is a target in every epoch (paper). random: one random position per
    user and epoch."""
    epoch_examples: int | None = Field(None, ge=1)
    """Train on at most this many targets per epoch, drawn anew for each epoch; none: all of `cuts`. Keeps the cost of
    an epoch the same however many interactions there are."""
    item_gradient: bool = False
    """Stage 1 only: recompute the item embeddings from their LLM outputs at every step, so that the head gets gradients
    from the items too (not in the paper, where item embeddings are fixed within an epoch)."""
    history_negatives: bool = True
    """true: all items are negatives in the softmax (paper). false: the history's own items are left out, because they
    are the closest by text but almost never the target, and pushing them away would damage the text match (not in the
    paper). No effect with head.seen_offset, which lowers the scores of those items instead."""
    temperature: float = Field(0.05, gt=0)
    """Softmax temperature [tau]."""
    learn_temperature: bool = False
    """Train the temperature too, starting from `temperature` (not in the paper)."""
    balance_weight: float = Field(0.01, ge=0)
    """Weight of the load-balancing loss [lambda]."""
    validation_users: int | None = Field(None, ge=1)
    """Choose the best epoch on this many validation users, drawn at random; none: all."""
    checkpoint_minutes: float = Field(5.0, gt=0)
    """Minutes between two checkpoints from which an interrupted training resumes."""
    seed: int = 0
    """Random seed for initialisation, batch order, cuts and dropout."""


class BlendConfig(_Section):
    """How much each part of Laser's score counts, chosen on validation after the training (not in the paper): the
    settings neighbours.*, head.id_share and the seen offset are then starting points."""

    trials: int = Field(0, ge=0)
    """Most blends of the fitted parts that are tried, milliseconds each. 0: keep the settings as they are."""
    regressions: int = Field(8, ge=0)
    """Most fits of neighbours with other settings (l2, text_weight, length_power) that are tried. Large catalogues get
    fewer, since the time grows with the items cubed."""
    users: int = Field(4000, ge=1)
    """Validation users that the choice is made on, drawn at random if there are more."""


class EvalConfig(_Section):
    """Evaluation by full ranking, the same for every method."""

    k: int = Field(10, ge=1)
    """Cut-off of Recall@k and NDCG@k."""
    batch_size: int = Field(64, ge=1)
    """Users that are encoded and ranked together."""
    validates: bool = True
    """Choose the best epoch on validation. false: train all epochs and keep the last, for data too small to validate
    on."""


class StudentConfig(_Section):
    """Distilling a fitted model into a small network that needs no LLM for users (not in the paper). A setting of
    `laserrec distil`, not part of `Config`."""

    hidden: int = Field(512, ge=1)
    """Width of the hidden layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the network's input and output."""
    views: int = Field(3, ge=0)
    """Additional histories made from each training sequence: alternately its beginning, up to a random item, and a
    random subset of its items in order."""
    histories: int = Field(50_000, ge=1)
    """Maximum number of histories that the teacher reads; if there are more, a random sample is drawn."""
    epochs: int = Field(3, ge=1)
    """Epochs over those histories."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW, with 50 warm-up steps and cosine decay to zero."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's decoupled weight decay."""
    batch_size: int = Field(128, ge=1)
    """Histories per training step."""
    seed: int = 0
    """Random seed for the choice of histories, initialisation, batch order and dropout."""


class Config(_Section):
    """All settings, one section per part."""

    data: DataConfig = DataConfig()
    id_model: IdModelConfig = IdModelConfig()
    backbone: BackboneConfig = BackboneConfig()
    prompt: PromptConfig = PromptConfig()
    mformer: MFormerConfig = MFormerConfig()
    head: HeadConfig = HeadConfig()
    neighbours: NeighboursConfig = NeighboursConfig()
    train: TrainConfig = TrainConfig()
    blend: BlendConfig = BlendConfig()
    eval: EvalConfig = EvalConfig()
    student: StudentConfig | None = None
    """Settings of the student; only in distilled models, set by `laserrec distil`."""

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


_ERRORS_TOLD = 10


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
    """Build settings from a nested dict.

    Raises UserError that names `source`, each wrong setting (`train.lr`) and what is wrong with it.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        found = error.errors()
        lines = [f"{_short('.'.join(map(str, e['loc'])))}: {_short(e['msg'])} (given: {_short(repr(e['input']))})"
                 for e in found[:_ERRORS_TOLD]]
        lines += [f"and {len(found) - _ERRORS_TOLD} more"] if len(found) > _ERRORS_TOLD else []
        raise UserError(f"settings are not valid ({source}): " + "; ".join(lines)) from None


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested dicts into a new one; values of `over` win."""
    out = dict(base)
    for key, value in over.items():
        inner = out.get(key)
        out[key] = merge(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return out


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with reading(file):
            return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such config file: {file}") from None
    except OSError as error:
        raise UserError(f"config file {file} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # bad TOML, bad UTF-8, a number or a nesting without end
        raise UserError(f"{file} is not valid TOML: {_short(str(error))}") from None
