"""A catalogue of unit vectors, and a Qdrant server that lives in this process."""

import numpy as np
import pytest
import torch

N, D = 30, 8


@pytest.fixture
def vectors():
    """Float[N D], of unit length."""
    return torch.nn.functional.normalize(torch.randn(N, D, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.fixture
def live():
    """Rows that are recommended: all but two."""
    return torch.tensor([i for i in range(N) if i not in (6, 19)])


@pytest.fixture
def queries():
    x = np.random.default_rng(1).normal(size=(5, D)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def server(monkeypatch):
    """The url of a Qdrant server; what one client writes the next one reads."""
    import qdrant_client

    real, there = qdrant_client.QdrantClient, {}

    def client(url=None, location=None):
        if url == "http://nobody":
            return real(url="http://127.0.0.1:1")
        return there.setdefault(url, real(location=":memory:")) if url else real(location=location)

    monkeypatch.setattr(qdrant_client, "QdrantClient", client)
    return "http://qdrant"
