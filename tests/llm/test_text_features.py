"""Whitened text vectors: what they are, and that nothing but the catalogue is in them."""

import tiny
import torch

from laserrec.llm.text_features import text_vectors


def test_rows_are_white(llm_folder, llm):
    config = tiny.config(llm_folder(), prompt={"layout": "text_first"})
    dataset = tiny.planted(60, 70)
    vectors = text_vectors(dataset, config, backbone=llm())
    assert vectors.shape == (60, 32)
    covariance = vectors.double().T @ vectors.double() / 60
    torch.testing.assert_close(covariance, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-2)
    assert len(vectors.unique(dim=0)) > 30  # titles are cut after eight tokens, so that some read alike


def test_other_users_give_the_same_vectors(llm_folder, llm):
    config = tiny.config(llm_folder(), id_model={**tiny.ID_MODEL.model_dump(), "items": "text"})
    few, many = (text_vectors(tiny.planted(20, *given), config, backbone=llm()) for given in ((30, 0), (50, 4)))
    assert torch.equal(few, many)
