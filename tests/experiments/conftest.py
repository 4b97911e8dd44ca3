"""Rivals of a few neurons."""

import pytest

from laserrec.experiments import quality


@pytest.fixture
def small_rivals(monkeypatch):
    small = {"d_id": 16, "blocks": 1, "max_history": 6, "max_epochs": 1}
    monkeypatch.setattr(quality, "ID_MODELS", {kind: small for kind in ("sasrec", "bert4rec")})
    return small
