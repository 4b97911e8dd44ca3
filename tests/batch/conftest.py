"""A small fitted model without an LLM, and files of histories."""

import polars as pl
import pytest
import tiny

from laserrec.recommender.recommender import LaserRecommender

N = 12


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("batch") / "model"
    LaserRecommender.fit_dataset(tiny.planted(N, users=16), tiny.config("none"), out, "sasrec", device="cpu",
                                 progress=False)
    return out


@pytest.fixture
def model(folder):
    return LaserRecommender.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="session")
def histories(tmp_path_factory):
    """400 users in 100 parts of 4; some have no history, some no known item."""
    rows = [[f"i{(u * 5 + p) % N + 1}" for p in range(u % 5)] if u % 7 else ["nope"] for u in range(400)]
    path = tmp_path_factory.mktemp("histories") / "h.parquet"
    pl.DataFrame({"user_id": range(100, 500), "items": rows}).write_parquet(path)
    return path
