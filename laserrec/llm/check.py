"""How a backbone would run on this machine, and whether the native forward agrees with transformers' own."""

from __future__ import annotations

from typing import Any

import torch

from laserrec.config import BackboneConfig, Engine, Precision
from laserrec.llm.backbone import load_backbone, resolve_precision


def check_backbone(name: str) -> dict[str, Any]:
    """Facts by name; `native_error` is the largest difference over the largest output, in fp32."""
    backbone = load_backbone(BackboneConfig(name=name, precision=Precision.FP32))
    facts: dict[str, Any] = {"name": name, "sha256": backbone.sha256, "width": backbone.d_llm,
                             "vocabulary": backbone.embedding.shape[0],
                             "engine": "native" if backbone.native else "transformers",
                             "precision here": str(resolve_precision(Precision.AUTO))}
    if backbone.native:
        reference = load_backbone(BackboneConfig(name=name, precision=Precision.FP32, engine=Engine.TRANSFORMERS))
        ids = torch.tensor([backbone.tokenizer("A history of items: 1. saw 2. hammer")["input_ids"]])
        with torch.no_grad():
            ours, theirs = (b.decoder(b.embed(ids)) for b in (backbone, reference))
        facts["layers"] = backbone.decoder.shape.layers
        facts["native_error"] = float((ours - theirs).abs().max() / theirs.abs().max())
    return facts
