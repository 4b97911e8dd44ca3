"""GRU4Rec (Hidasi et al. 2016, "Session-based Recommendations with Recurrent Neural Networks"), with the full softmax
over all items in place of its pairwise losses on sampled items."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.config import IdModelConfig
from laserrec.methods.sasrec import SASRec


class GRU4Rec(SASRec):
    """A recurrent network over the history; every position predicts the next item, as in SASRec."""

    def __init__(self, config: IdModelConfig, n_items: int, text: Float[Tensor, "n_items d_text"] | None = None):
        super().__init__(config, n_items, text)
        del self.blocks, self.position  # the order is in the recurrence
        self.gru = nn.GRU(config.d_id, config.d_id, config.blocks,
                          dropout=config.dropout if config.blocks > 1 else 0.0)
        self.out = nn.Linear(config.d_id, config.d_id)

    def states(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_id"]:
        """C_u: one state per item, of the items up to it. Padding stands behind them and changes nothing."""
        steps = self.embedding_dropout(self.embed(items)).transpose(0, 1).contiguous()
        hidden, _ = self.gru(steps)
        return self.out(self.embedding_dropout(hidden.transpose(0, 1)))

    @classmethod
    def shapes(cls, config: IdModelConfig, n_known: int) -> dict[str, tuple[int, ...]]:
        """As SequenceModel.shapes."""
        return {"item.weight": (n_known + 2, config.d_id),
                f"gru.weight_hh_l{config.blocks - 1}": (3 * config.d_id, config.d_id)}
