"""Whitened vectors of item texts from the frozen LLM as it is: what text-aware ID models and text rivals start from."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from laserrec.config import Config, HeadConfig, ItemSide, MFormerConfig, Pooling, Prefix, PromptConfig
from laserrec.data.sequences import Dataset
from laserrec.encoder import Catalogue, Encoder
from laserrec.models.backbone import Backbone, load_backbone
from laserrec.models.head import Head
from laserrec.models.id_models import make_id_model
from laserrec.models.laser import Laser
from laserrec.progress import Progress

_DIMS = 512


def text_vectors(
    dataset: Dataset, config: Config, progress: bool = False, backbone: Backbone | None = None,
    whiten_by: int | None = None,
) -> Float[Tensor, "n_items d_text"]:
    """One row per item, dense order, centred and whitened, the most important dimension first; at most 512 wide.

    The text, the layers and the layout are the config's; no prefix, [EOS] as the suffix, nothing trained. Nothing but
    the catalogue is read. whiten_by: mean and covariance are those of the first so many items alone.
    """
    backbone = backbone or load_backbone(config.backbone)
    prompt = PromptConfig(**{**dict(config.prompt), "item_side": ItemSide.PLAIN})
    plain = Config(**{**dict(config), "prompt": prompt, "mformer": MFormerConfig(prefix=Prefix.NONE),
                      "head": HeadConfig(pooling=Pooling.EOS)})
    id_model = make_id_model(config.id_model.model_copy(update={"items": "ids"}), dataset.n_items)  # not read: plain
    laser = Laser(plain, backbone, id_model.d_id)
    encoder = Encoder(laser, id_model, Catalogue(laser, dataset.items, dataset.n_items, progress))
    with Progress("encoding item texts", dataset.n_items, progress) as bar:
        outputs = encoder.encode_items(config.eval.batch_size, raw=True, progress=bar.advance)
    head = Head(HeadConfig(whiten_dims=min(_DIMS, backbone.d_llm)), backbone.d_llm)
    head.fit_whitening(outputs[:whiten_by])
    return head(outputs)
