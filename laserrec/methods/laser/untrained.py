"""Nearest neighbour with the LLM as it is: no prefix, [EOS] as the suffix, nothing trained.

The same text, layout and layers as the Laser that it stands beside. The mean of the outputs over a text, whitened, is
the stronger rival: `laserrec.methods.linear.NearestText`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.config import Config, HeadConfig, ItemSide, MFormerConfig, Pooling, Prefix
from laserrec.methods.laser.encoder import Encoder
from laserrec.methods.laser.model import Laser


class UntrainedLLM:
    """Cosine of untrained outputs of history and item. `encoder`: its LLM, texts and batch size are used."""

    def __init__(self, encoder: Encoder):
        config = encoder.laser.config
        head = HeadConfig(pooling=Pooling.EOS)
        prompt = config.prompt.model_copy(update={"item_side": ItemSide.PLAIN})
        plain = {**dict(config), "prompt": prompt, "mformer": MFormerConfig(prefix=Prefix.NONE), "head": head}
        laser = Laser(Config(**plain), encoder.laser.backbone, encoder.id_model.d_id)
        self.encoder = Encoder(laser, encoder.id_model, encoder.catalogue)
        outputs = self.encoder.encode_items(config.eval.batch_size, raw=True)
        self.items = torch.nn.functional.normalize(laser.head(outputs), dim=-1)

    def score(self, histories: Sequence[np.ndarray]) -> Float[Tensor, "batch n_items"]:
        users = self.encoder.encode(histories, len(histories))
        return torch.nn.functional.normalize(users, dim=-1) @ self.items.T
