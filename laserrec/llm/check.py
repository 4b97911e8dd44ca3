"""How a backbone would run on a device, and whether the native forward agrees with transformers' own."""

from __future__ import annotations

from typing import Any

import torch

from laserrec.config import BackboneConfig, Engine, Precision
from laserrec.llm.backbone import load_backbone
from laserrec.llm.decoder import NativeDecoder
from laserrec.llm.precision import resolve_precision
from laserrec.util.device import CPU


def check_backbone(name: str, device: torch.device = CPU) -> dict[str, Any]:
    """Facts by name; `native_error` is the largest difference over the largest output, in fp32."""
    backbone = load_backbone(BackboneConfig(name=name, precision=Precision.FP32), device)
    facts: dict[str, Any] = {"name": name, "sha256": backbone.sha256, "width": backbone.d_llm,
                             "vocabulary": backbone.embedding.shape[0],
                             "engine": "native" if backbone.native else "transformers",
                             "device": str(device), "precision here": str(resolve_precision(Precision.AUTO, device))}
    if isinstance(backbone.decoder, NativeDecoder):
        reference = load_backbone(BackboneConfig(name=name, precision=Precision.FP32, engine=Engine.TRANSFORMERS),
                                  device)
        ids = backbone.tokens([backbone.tokenizer("A history of items: 1. saw 2. hammer")["input_ids"]])
        with torch.no_grad():
            ours, theirs = (b.decoder(b.embed(ids)) for b in (backbone, reference))
        facts["layers"] = backbone.decoder.shape.layers
        facts["native_error"] = float((ours - theirs).abs().max() / theirs.abs().max())
    return facts
