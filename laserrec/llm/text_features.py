"""Vectors of item texts from the frozen LLM as it is: what text-aware ID models, neighbours and text rivals start from.

An item's vector is the mean of the LLM's outputs over the item's own text, centred and whitened, at one depth or at
several side by side. Nothing is trained and nothing but the catalogue is read. On amazon-scientific it finds the next
item far better than the output at a last [EOS] does (dev/LOG.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.config import Config, HeadConfig, PromptConfig
from laserrec.data.dataset import Dataset
from laserrec.data.prompt import PromptEncoder
from laserrec.llm.backbone import Backbone, load_backbone
from laserrec.methods.laser.head import Head
from laserrec.util.progress import Progress

_DIMS = 512
_MAX_TOKENS = 64
"""Of one item's text; read once per catalogue, it may be longer than what every history repeats."""
_AT_ONCE = 64
"""Texts per pass of the LLM."""
_KEPT_BYTES = 2**28
"""Outputs no larger than this stay with the backbone: an ID model, Laser and its rivals all want those of one
catalogue, and reading it takes minutes."""


@torch.no_grad()
def mean_outputs(
    backbone: Backbone, prompt: PromptConfig, items: pl.DataFrame, progress: Callable[[int], None] | None = None
) -> Float[Tensor, "n_items d_means"]:
    """Per row of `items` (title and the prompt's attributes), the mean of the LLM's outputs over the item's line, read
    alone; behind each of backbone.mean_layers, side by side, or behind the last layer that is used. The first token is
    left out: it takes up what attention has no use for and its output says little of it."""
    encoder = PromptEncoder(backbone.tokenizer, prompt.model_copy(update={"max_item_tokens": _MAX_TOKENS}))
    lines = encoder.item_tokens(items)
    key = hashlib.sha256(b"".join(len(x).to_bytes(4, "little") + x.astype(np.int32).tobytes() for x in lines)).digest()
    if key in backbone.kept_means:
        if progress:
            progress(len(lines))
        return backbone.kept_means[key].clone()
    out, at_layers = torch.empty(len(lines), backbone.d_means), backbone.config.mean_layers
    order = np.argsort([len(line) for line in lines], kind="stable")
    for at in range(0, len(order), _AT_ONCE):
        chunk = order[at : at + _AT_ONCE]
        rows = [backbone.embed(torch.as_tensor(lines[i], dtype=torch.long)) for i in chunk]
        read = backbone.decoder.read_layers(rows, at_layers) if at_layers else backbone.decoder.read_rows(rows, False)
        outputs = read.split([len(row) for row in rows])
        out[torch.as_tensor(chunk)] = torch.stack([x[min(1, len(x) - 1) :].float().mean(dim=0) for x in outputs])
        if progress:
            progress(len(chunk))
    if out.nbytes <= _KEPT_BYTES:
        backbone.kept_means.clear()
        backbone.kept_means[key] = out.clone()
    return out


def whitened(
    outputs: Float[Tensor, "n_items d_means"], layers: int, by: int | None = None
) -> Float[Tensor, "n_items d_text"]:
    """Each of the `layers` that stand side by side centred and whitened with the mean and covariance of the first `by`
    rows (None: all), the most important dimension first; at most 512 wide."""
    d_llm = outputs.shape[1] // layers
    head = Head(HeadConfig(whiten_dims=min(_DIMS, d_llm)), d_llm, mean_layers=layers)
    head.fit_whitening(outputs[:by])
    return head.whiten_items(outputs)


def text_vectors(
    dataset: Dataset, config: Config, progress: bool = False, backbone: Backbone | None = None,
    whiten_by: int | None = None,
) -> Float[Tensor, "n_items d_text"]:
    """One row per item, dense order: `mean_outputs` of the config's LLM and attributes, `whitened`."""
    backbone = backbone or load_backbone(config.backbone)
    with Progress("encoding item texts", dataset.n_items, progress) as bar:
        outputs = mean_outputs(backbone, config.prompt, dataset.items, bar.advance)
    return whitened(outputs, backbone.mean_depths, whiten_by)
