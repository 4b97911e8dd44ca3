"""All settings of laserrec, in one frozen tree.

A config is built from a preset, then a TOML file, then single overrides (`--train.lr 1e-3`); later ones win and unknown
names are errors. Symbols in brackets are those of the paper (Zhang et al. 2024, "Laser"). "Not in the paper" marks
options that we added.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, model_validator

from laserrec.config.data import DataConfig, EvalConfig, Split
from laserrec.config.id_model import IdLoss, IdModelConfig, IdModelKind, ItemTable, Softmax
from laserrec.config.laser import (
    BlendConfig,
    Cuts,
    HeadConfig,
    MFormerConfig,
    Negatives,
    NeighboursConfig,
    Pooling,
    Prefix,
    RegressionForm,
    Routing,
    StudentConfig,
    TrainConfig,
    TransformerConfig,
)
from laserrec.config.llm import (
    BackboneConfig,
    Engine,
    ItemSide,
    ItemVectors,
    Layout,
    Precision,
    PromptConfig,
    Quantization,
    Template,
)
from laserrec.config.rivals import (
    FDSAConfig,
    KARConfig,
    LlamaRecConfig,
    LLM4RecConfig,
    LruRecConfig,
    RecFormerConfig,
    RecGURUConfig,
    SequenceRivalConfig,
    ZESRecBody,
    ZESRecConfig,
)
from laserrec.config.section import Section
from laserrec.util.errors import UserError, reading

__all__ = [
    "BackboneConfig", "BlendConfig", "Config", "Cuts", "DataConfig", "Engine", "EvalConfig", "FDSAConfig", "HeadConfig",
    "IdLoss", "IdModelConfig", "IdModelKind", "ItemSide", "ItemTable", "ItemVectors", "KARConfig", "LLM4RecConfig",
    "Layout", "LlamaRecConfig", "LruRecConfig", "MFormerConfig", "Negatives", "NeighboursConfig", "Pooling",
    "Precision", "Prefix", "PromptConfig", "Quantization", "RecFormerConfig", "RecGURUConfig", "RegressionForm",
    "Routing", "SequenceRivalConfig", "Softmax", "Split", "StudentConfig", "Template", "TrainConfig",
    "TransformerConfig", "ZESRecBody", "ZESRecConfig", "load_config", "merge", "seeds", "valid",
]

_S = TypeVar("_S", bound=BaseModel)


class Config(Section):
    """All settings, one section per part."""

    data: DataConfig = DataConfig()
    id_model: IdModelConfig = IdModelConfig()
    backbone: BackboneConfig = BackboneConfig()
    prompt: PromptConfig = PromptConfig()
    mformer: MFormerConfig = MFormerConfig()
    transformer: TransformerConfig = TransformerConfig()
    head: HeadConfig = HeadConfig()
    neighbours: NeighboursConfig = NeighboursConfig()
    train: TrainConfig = TrainConfig()
    blend: BlendConfig = BlendConfig()
    eval: EvalConfig = EvalConfig()
    lrurec: LruRecConfig = LruRecConfig()
    llamarec: LlamaRecConfig = LlamaRecConfig()
    recformer: RecFormerConfig = RecFormerConfig()
    llm4rec: LLM4RecConfig = LLM4RecConfig()
    student: StudentConfig | None = None
    """Settings of the student; only in distilled models, set by `laserrec distil`."""
    fdsa: FDSAConfig = FDSAConfig()
    zesrec: ZESRecConfig = ZESRecConfig()
    kar: KARConfig = KARConfig()
    recguru: RecGURUConfig = RecGURUConfig()

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
        learns = self.head.projection or self.transformer.blocks
        if not reads and not learns and self.train.stage_one_epochs + self.train.stage_two_epochs:
            raise ValueError("prompt.layout none without head.projection and transformer has nothing to train; set "
                             "train.stage_one_epochs and train.stage_two_epochs to 0")
        if self.train.negatives == Negatives.BATCH and self.prompt.item_side != ItemSide.TRAINED:
            raise ValueError("train.negatives batch embeds the targets with the trained prefix and suffix; it needs "
                             "prompt.item_side trained")
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
    from laserrec.presets import METHOD_SETTINGS, PRESETS, RIVAL_SIZES

    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; there are: {', '.join(PRESETS)}")
    tree = merge(PRESETS[preset], METHOD_SETTINGS.get(method, {}))
    if preset != "paper":
        tree = merge(tree, RIVAL_SIZES.get(method, {}))
    source = f"preset {preset}"
    if file is not None:
        tree = merge(tree, _read_toml(file))
        source = str(file)
    return valid(Config, merge(tree, overrides or {}), f"{source} with overrides")


def seeds(seed: int) -> dict[str, dict[str, int]]:
    """Overrides that give all parts of a fit the same random seed."""
    return {name: {"seed": seed} for name, section in Config.model_fields.items()
            if "seed" in getattr(section.annotation, "model_fields", {})}


def valid(kind: type[_S], tree: dict[str, Any], source: str) -> _S:
    """Build settings from a nested dict.

    Raises UserError that names `source`, each wrong setting (`train.lr`) and what is wrong with it.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"settings are not valid ({source}): {problems(error)}") from None


def problems(error: ValidationError) -> str:
    """Each wrong setting, what is wrong with it and what was given, in one line."""
    found = error.errors()
    lines = [f"{_short('.'.join(map(str, e['loc'])))}: {_short(e['msg'])} (given: {_short(repr(e['input']))})"
             for e in found[:_ERRORS_TOLD]]
    lines += [f"and {len(found) - _ERRORS_TOLD} more"] if len(found) > _ERRORS_TOLD else []
    return "; ".join(lines)


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
