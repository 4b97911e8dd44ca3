"""Settings of Laser itself: M-Former, head, neighbours, training, blend, student."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, model_validator

from laserrec.config.section import Section, check_heads


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


class MFormerConfig(Section):
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
        check_heads("d_model", self.d_model, self.heads)
        return self


class TransformerConfig(Section):
    """A small causal transformer over the items' vectors, which reads histories where the LLM does not (not in the
    paper). With any prompt.layout but none there is none."""

    blocks: int = Field(0, ge=0)
    """Transformer blocks. 0: there is none."""
    d_model: int = Field(256, ge=2)
    """Width of the states."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    d_inner: int = Field(512, ge=1)
    """Width inside the feed-forward layers."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout on inputs, attention output and feed-forward output."""
    max_history: int = Field(50, ge=1)
    """Number of most recent items that it reads."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerConfig:
        check_heads("d_model", self.d_model, self.heads)
        return self


class Pooling(StrEnum):
    """Which LLM outputs make the embedding."""

    SUFFIX = "suffix"
    MEAN = "mean"
    EOS = "eos"


class HeadConfig(Section):
    """The head: from the LLM's outputs to an embedding."""

    pooling: Pooling = Pooling.SUFFIX
    """suffix: the output at the trained last token (paper). mean: the average over the text's outputs. eos: the output
    at a frozen [EOS] token. The last two are the variants of Table 5."""
    suffix_from_eos: bool = False
    """Initialise the suffix with the LLM's [EOS] embedding instead of at random (not in the paper)."""
    whiten_dims: int = Field(0, ge=0)
    """0: use the LLM's output as it is (paper). n: centre it and whiten it to n dimensions (PCA whitening, not in the
    paper). Mean and covariance are computed once over all items, before training. In a catalogue of fewer than 2.5 n
    items, the directions behind two fifths of their number are zero."""
    projection: bool = False
    """Add a trained linear map after the whitening, initialised as the identity (not in the paper)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the projection."""
    id_share: float = Field(0.0, ge=0, lt=1)
    """Weight of the ID model's own cosine in the score: (1 - id_share) x text cosine + id_share x ID cosine. 0: the
    text cosine alone (paper). The training loss uses the text cosine alone, because the ID model has already been
    trained on the same targets and the mixture would rely on it too much."""
    id_product: bool = False
    """The ID cosine is made to order items as the ID model itself does, by inner product and bias: its vectors get
    two dimensions more, in which items fill up to equal length (Bachrach et al. 2014). false: the cosine of the ID
    model's state and the item's embedding, in which their lengths and biases are lost."""
    seen_offset: bool = False
    """Learn one number that is added to the scores of all items in the user's history (not in the paper). Those items
    are the closest by text, while the rate of repeat purchases differs from shop to shop."""
    seen_offset_start: float = -1.0
    """Initial value of that number. Negative, since most people buy something new."""


class RegressionForm(StrEnum):
    """How the item-to-item regression is solved."""

    AUTO = "auto"
    EXACT = "exact"
    LOCAL = "local"


class NeighboursConfig(Section):
    """Closed-form item-to-item regression (EASE) on training sequences and item texts (not in the paper). Each pair of
    items gets a neighbour weight; items with high weights to the history's items get a score boost on top of their
    cosine. Method and sources: laserrec.methods.neighbours."""

    count: int = Field(0, ge=0)
    """Number of neighbours kept per item. 0: no neighbours, the score is the cosine (paper)."""
    form: RegressionForm = RegressionForm.AUTO
    """exact: one regression over all items, whose time grows with their number cubed and memory squared. local: for
    each item one over its own candidates, for large catalogues. auto: exact up to 20,000 items, local above."""
    candidates: int = Field(300, ge=1)
    """local only: items that each item's regression is made of, the most co-occurring and the nearest by text."""
    l2: float = Field(200.0, gt=0)
    """L2 (ridge) penalty of the regression."""
    text_weight: float = Field(4.0, ge=0)
    """Weight of the item texts relative to the training sequences in the regression. 0: sequences alone."""
    order: float = Field(0.0, ge=0, le=1)
    """Weight of what follows what in the training sequences, relative to what stands in them together. 0: the order of
    items does not count (EASE). 1: it alone counts."""
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


class Negatives(StrEnum):
    """What a target is told from."""

    ALL = "all"
    SAMPLED = "sampled"
    BATCH = "batch"


class TrainConfig(Section):
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
    epoch_items: int | None = Field(None, ge=1)
    """Train on at most as many targets per epoch as have about this many history items that are read; none: no such
    bound. Keeps the cost of an epoch the same however long the histories are."""
    item_gradient: bool = False
    """Stage 1 only: recompute the item embeddings from their LLM outputs at every step, so that the head gets gradients
    from the items too (not in the paper, where item embeddings are fixed within an epoch)."""
    negatives: Negatives = Negatives.ALL
    """all: the softmax goes over all items, whose embeddings are those of the epoch's beginning (paper). sampled (not
    in the paper): over the batch's own targets and `sampled_items` others drawn at each step, corrected for how likely
    each is to be among them; a step then costs the same however large the catalogue is. batch (not in the paper;
    prompt.item_side trained only): in stage 1 over the batch's own targets, embedded anew at every step, with gradient
    through the same prefix and suffix and corrected for how often each item is a target (Yi et al. 2019); in stage 2
    over all items."""
    sampled_items: int = Field(1024, ge=1)
    """negatives sampled only: items drawn at each step. With as many items or fewer, the softmax is the full one."""
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


class BlendConfig(Section):
    """How much each part of Laser's score counts, chosen on validation after the training (not in the paper): the
    settings neighbours.*, head.id_share and the seen offset are then starting points."""

    trials: int = Field(0, ge=0)
    """Most blends of the fitted parts that are tried, milliseconds each. 0: keep the settings as they are."""
    regressions: int = Field(16, ge=0)
    """Most fits of neighbours with other settings (order, decay, text_weight, l2, row_power, length_power) that are
    tried. Large catalogues get fewer, since the time grows with the items cubed."""
    shuffles: tuple[float, ...] = ()
    """Further values of id_model.shuffle that are tried when the ID model is fitted with Laser; the one with the best
    validation NDCG stays. Where order counts, shuffling harms."""
    shuffle_epochs: int = Field(6, ge=1)
    """Epochs after which values in `shuffles` are given up whose validation NDCG is more than 5% below the best one's,
    rounded up to the next validation (id_model.eval_every). The others go on to their end."""
    light_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of a further ID model that is tried, with little regularisation: light_weight_decay, and nothing
    shuffled. It needs few epochs, and suits data with many interactions per item. The ID model as given is then given
    up where it is more than 5% below this one's best validation NDCG after as many epochs as that took, and as
    patience lasts. none: it is not tried."""
    light_weight_decay: float = Field(0.1, ge=0)
    """Weight decay of that one."""
    network: int = Field(0, ge=0)
    """Hidden units of a network that ranks items anew by the parts of their scores, trained on validation users; 0:
    none. It is not kept where it makes the ranking worse, beyond chance, for users that it was not trained on. None
    above 100,000 items, and without blend.trials."""
    network_users: int = Field(12_000, ge=1)
    """Validation users that the network is trained on, drawn at random if there are more."""
    users: int = Field(4000, ge=1)
    """Validation users that the choice is made on, drawn at random if there are more."""


class StudentConfig(Section):
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
