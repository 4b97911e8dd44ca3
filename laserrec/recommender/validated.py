"""What a fit tells of its model on the validation split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def validated(training: Mapping[str, Any]) -> dict[str, Any]:
    """{metric: value, users} of a fitted model on validation, by `facts["training"]`; empty if it was not validated.
    Where its parts were weighed after the training, NDCG@10 of what came of that; where a network ranks items anew, for
    users that it was not trained on."""
    if parts := training.get("parts"):
        if (network := parts.get("network", {})).get("kept"):
            return {"ndcg@10": network["network"], "users": network.get("users", parts["users"])}
        return {"ndcg@10": parts["ndcg@10"]["chosen"], "users": parts["users"]}
    return {name.removeprefix("validation_"): value for name, value in training.get("kept", {}).items()
            if name.startswith("validation_")}


def trained_on_validation(training: Mapping[str, Any]) -> bool:
    """Whether a network that ranks items anew, which a distilled model has from its teacher, has learnt from the
    targets of validation users: a measurement of the fitted model on these tells too much."""
    own = (training.get("parts") or {}).get("network", {}).get("kept", False)
    return own or ("teacher" in training and trained_on_validation(training["teacher"]))
