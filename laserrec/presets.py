"""Named starting points. Only what differs from the config's own defaults stands here."""

from typing import Any

# The paper's settings (appendix B), with the embedded decoder unless `backbone.name` names a 6B one.
_PAPER: dict[str, Any] = {
    "id_model": {"kind": "bert4rec", "d_id": 64, "dropout": 0.2},
    "backbone": {"name": "THUDM/chatglm2-6b"},
    "mformer": {"experts": 8, "queries": 32, "blocks": 12, "d_model": 768, "heads": 12},
    "train": {"batch_size": 4, "lr": 1e-4, "stage_one_epochs": 15, "stage_two_epochs": 5},
}

_SMALL: dict[str, Any] = {
    "mformer": {"experts": 4, "queries": 8, "blocks": 2, "d_model": 128, "heads": 4},
}

PRESETS: dict[str, dict[str, Any]] = {"small": _SMALL, "quickstart": _SMALL, "paper": _PAPER}
