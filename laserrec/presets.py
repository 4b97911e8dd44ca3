"""Named starting points. Only what differs from the config's own defaults stands here; dev/LOG.md has the why."""

from typing import Any

# Settings per kind that did best on amazon-scientific's validation split; gru4rec's are a first guess.
ID_MODELS: dict[str, dict[str, Any]] = {
    "sasrec": {"weight_decay": 1.0, "shuffle": 0.5, "patience": 5, "eval_every": 2},
    "bert4rec": {"lr": 3e-3, "weight_decay": 0.3, "dropout": 0.2, "mask_probability": 0.4, "patience": 4,
                 "eval_every": 4},
    "gru4rec": {"weight_decay": 0.1, "patience": 5, "eval_every": 2},
}

# EASE on IDs alone, as a rival: the best of 378 settings of l2, length_power, decay and row_power.
EASE: dict[str, Any] = {"l2": 400.0, "text_weight": 0.0, "row_power": 0.5, "order": 0.0}
EASE_TEXT: dict[str, Any] = {"order": 0.0}

METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "sasrec": {"id_model": {"items": "ids", "lr": 1e-3, "dropout": 0.5, **ID_MODELS["sasrec"]}},
    "bert4rec": {"id_model": {"items": "ids", "shuffle": 0.0, **ID_MODELS["bert4rec"]}},
    "gru4rec": {"id_model": {"items": "ids", "blocks": 1, "dropout": 0.5, "shuffle": 0.0, **ID_MODELS["gru4rec"]}},
    "ease": {"neighbours": EASE},
    "ease-text": {"neighbours": EASE_TEXT},
}
"""Laid on the preset, whose settings suit Laser, where a method is fitted alone; an ID model then knows IDs alone."""

_LRUREC: dict[str, Any] = {"seen_offset": True, "patience": 5, "eval_every": 2}
_SASREC_LIKE: dict[str, Any] = {"seen_offset": True, **ID_MODELS["sasrec"]}
"""What helped SASRec on amazon-scientific and is given to rivals over sequences too, so that terms are equal."""

RIVAL_SIZES: dict[str, dict[str, Any]] = {
    "lrurec": {"lrurec": _LRUREC},
    "llamarec": {"lrurec": _LRUREC, "backbone": {"layers": 6},
                 "llamarec": {"max_history": 10, "title_tokens": 12, "epoch_examples": 8000, "lr": 1e-3},
                 "train": {"validation_users": 2000}},
    "recformer": {"recformer": {"d_model": 128, "blocks": 2, "heads": 2, "window": 32, "max_items": 8,
                                "max_tokens": 256, "attribute_tokens": 16, "lr": 1e-3, "pretrain_own": True,
                                "pretrain_epochs": 10}},
    "llm4rec": {"backbone": {"layers": 3},
                "llm4rec": {"seen_offset": True, "max_history": 20, "max_epochs": 20, "patience": 3}},
    "fdsa": {"fdsa": {"d_model": 128, "d_inner": 128, **_SASREC_LIKE}},
    "zesrec": {"zesrec": {"d_model": 128, "blocks": 1, **_SASREC_LIKE}},
    "kar": {"kar": {"own_experts": 2, "d_inner": 64, **_SASREC_LIKE}},
    "recguru": {"recguru": {"blocks": 2, "d_inner": 128, "max_epochs": 100}},
}
"""By method: what is smaller than published for two CPU cores. Not laid on the preset `paper`."""

# The paper's settings (appendix B). Any other decoder of that size goes in with --backbone.name.
_PAPER: dict[str, Any] = {
    "id_model": {"kind": "bert4rec", "d_id": 64, **ID_MODELS["bert4rec"]},
    "backbone": {"name": "THUDM/chatglm2-6b"},
    "mformer": {"experts": 8, "queries": 32, "blocks": 12, "d_model": 768, "heads": 12},
    "train": {"batch_size": 4, "lr": 1e-4, "stage_one_epochs": 15, "stage_two_epochs": 5},
}

# The paper's method, every choice kept, at a size for two CPU cores: a small LLM's first layers, short texts, a small
# M-Former and one random cut per user and epoch, so that an epoch takes minutes. The learning rate is higher since
# there are far fewer steps.
_PAPER_SMALL: dict[str, Any] = {
    "id_model": {"kind": "bert4rec", "d_id": 64, **ID_MODELS["bert4rec"]},
    "backbone": {"layers": 6},
    "prompt": {"max_items": 8, "max_item_tokens": 16},
    "mformer": {"experts": 4, "queries": 8, "blocks": 2, "d_model": 128, "heads": 4},
    "train": {"batch_size": 32, "lr": 1e-3, "cuts": "random", "stage_one_epochs": 15, "stage_two_epochs": 5,
              "tokens_per_pass": 4096, "validation_users": 2000},
}

# For two CPU cores too, with what was found to help. The LLM reads each item's text once; a small transformer over the
# items' vectors reads the histories, so that the LLM is needed for new items alone.
_SMALL: dict[str, Any] = {
    "id_model": {"kind": "sasrec", "items": "llm_start", "seen_offset": True, **ID_MODELS["sasrec"]},
    "backbone": {"layers": 6, "mean_layers": (6, 20, 30)},
    "prompt": {"layout": "none", "item_side": "mean", "max_item_tokens": 24},
    "mformer": {"prefix": "none"},
    "transformer": {"blocks": 2},
    "head": {"whiten_dims": 512, "projection": True, "dropout": 0.1, "id_share": 0.4, "id_product": True,
             "seen_offset": True},
    "neighbours": {"count": 100, "temperature": 0.1, "share": 16.0, "order": 0.5},
    "blend": {"trials": 300, "shuffles": (0.0,), "light_dropout": 0.2, "network": 32},
    "train": {"lr": 1e-3, "weight_decay": 0.5, "batch_size": 128, "stage_one_epochs": 2, "stage_two_epochs": 1,
              "warmup_fraction": 0.05, "cosine_decay": True, "epoch_examples": 50_000, "epoch_items": 300_000,
              "item_gradient": True, "negatives": "sampled", "history_negatives": False, "temperature": 0.07},
    "eval": {"batch_size": 64},
}

READING: dict[str, Any] = {
    "prompt": {"layout": "text_first"},
    "mformer": {"prefix": "mformer", "experts": 4, "queries": 4, "blocks": 2, "d_model": 128, "heads": 4,
                "zero_init": True, "routing": "gate_scaled", "state_dropout": 0.05},
    "transformer": {"blocks": 0},
    "head": {"suffix_from_eos": True},
}
"""Laid on `small`: the paper's way of reading histories in the transformer's place, the LLM with prefix and suffix."""

_BI_TUNING: dict[str, Any] = {
    **_SMALL, **{section: {**_SMALL[section], **settings} for section, settings in READING.items()}}

# Closed forms alone: item-to-item regression on sequences and the LLM's text vectors; no ID model, no training by
# gradient, and no LLM to answer with.
_INSTANT: dict[str, Any] = {
    "id_model": {"kind": "none"},
    "backbone": {"layers": 6, "mean_layers": (6, 20, 30)},
    "prompt": {"layout": "none", "item_side": "mean"},
    "mformer": {"prefix": "none"},
    "head": {"whiten_dims": 512, "seen_offset": True, "seen_offset_start": -3.0},
    "neighbours": {"count": 200, "share": 0.001, "order": 0.5},
    "blend": {"trials": 300},
    "train": {"stage_one_epochs": 0, "stage_two_epochs": 0},
}

# `small` for a first look: minutes on two cores. Item texts are read at one depth, a fifth of the time, which costs
# Laser 2% on test; an epoch has one cut per user in place of all; one SASRec is rival and ID model; no ranking network.
_QUICKSTART: dict[str, Any] = {
    **_SMALL,
    "id_model": {**_SMALL["id_model"], "items": "ids", "patience": 3},
    "backbone": {**_SMALL["backbone"], "mean_layers": (6,)},
    "blend": {"trials": 150, "regressions": 6},
    "train": {**_SMALL["train"], "cuts": "random", "stage_one_epochs": 3, "stage_two_epochs": 0,
              "validation_users": 2000},
}

PRESETS: dict[str, dict[str, Any]] = {"small": _SMALL, "bi-tuning": _BI_TUNING, "instant": _INSTANT,
                                      "quickstart": _QUICKSTART, "paper-small": _PAPER_SMALL, "paper": _PAPER}
