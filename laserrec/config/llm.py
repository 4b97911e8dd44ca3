"""Settings of the frozen LLM and of the prompt."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field, model_validator

from laserrec.config.section import Section


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


class ItemVectors(StrEnum):
    """What is made of the items' own vectors."""

    BESIDE = "beside"
    INSTEAD = "instead"
    NONE = "none"


class BackboneConfig(Section):
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
    item_vectors: ItemVectors = ItemVectors.BESIDE
    """Vectors of the items that the data folder has (laserrec prepare --vectors), whitened on their own. beside: they
    stand beside the LLM's text vectors. instead: in their place; the LLM is then used for histories alone. none: not
    used. No effect on data without any."""
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


class PromptConfig(Section):
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
    text_cache_gib: float | None = Field(None, ge=0)
    """text_first on a CPU only: memory in GiB for the keys and values of the item texts. Where they are larger, they
    are held in a file on the disk, in the folder texts of the cache (LASERREC_CACHE), which is gone when the process
    ends; results are the same. none: half of the memory that is free."""
    attributes: tuple[str, ...] = ("brand", "category")
    """Item columns that are written in brackets after the title: brand, category, and any of data.item_columns."""

    @model_validator(mode="after")
    def _shared_text_has_one_instruction(self) -> PromptConfig:
        if self.layout == Layout.TEXT_FIRST and self.template == Template.ITEM_INSTRUCTION:
            raise ValueError("template item_instruction needs layout prefix_first: with text_first users and items "
                             "share one reading of the text")
        return self
