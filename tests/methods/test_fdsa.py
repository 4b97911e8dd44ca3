"""FDSA against plain loops."""

import polars as pl
import tiny
import torch

from laserrec.config import FDSAConfig, PromptConfig
from laserrec.methods.fdsa import FDSA, FieldPooling, field_vectors
from laserrec.methods.parts import ItemVectors


def test_fields_are_weighed_by_the_softmax_of_their_scores():
    torch.manual_seed(0)
    pooling, texts = FieldPooling(3, 5, 4), torch.randn(2, 3, 5)
    known = torch.tensor([[True, True, True], [True, False, True]])
    found = pooling(texts, known)
    for item in range(2):
        vectors = [pooling.adaptors[f](texts[item, f]) for f in range(3) if known[item, f]]
        weights = torch.stack([pooling.score(v)[0].exp() for v in vectors])
        torch.testing.assert_close(found[item], sum(w * v for w, v in zip(weights / weights.sum(), vectors,
                                                                           strict=True)))


def test_the_last_states_are_joined_by_one_layer_and_normalised():
    torch.manual_seed(0)
    model = FDSA(FDSAConfig(d_model=8, d_inner=8, max_history=5), 6, fields=2, d_text=3).eval()
    texts, known = torch.randn(6, 2, 3), torch.ones(6, 2, dtype=torch.bool)
    model.features = ItemVectors(model.pooling, (texts, known))
    rows = torch.tensor([4, 1, 2])
    ids = model.ids(model.item.weight[rows][None])[0, -1]
    features = model.texts(model.pooling(texts, known)[rows][None])[0, -1]
    user = model.norm(model.joined.weight @ torch.cat([ids, features]) + model.joined.bias)
    torch.testing.assert_close(model.score(tiny.histories([4, 1, 2]))[0], model.item.weight[:6] @ user,
                               atol=1e-5, rtol=1e-4)


def test_fields_are_title_and_the_attributes_that_there_are(llm):
    features, prompt = tiny.features(llm()), PromptConfig()
    frame = tiny.items(9).with_columns(category=pl.lit(None, dtype=pl.String))
    vectors, known = field_vectors(features, frame, prompt, separate=True)
    assert vectors.shape[:2] == (9, 2)  # nobody has a category
    assert known[:, 0].all() and known[:, 1].tolist() == frame["brand"].is_not_null().to_list()
    torch.testing.assert_close(vectors[:, 0], features.vectors(frame.select("title")))
    whole, known = field_vectors(features, frame, prompt, separate=False)
    assert known.all()
    torch.testing.assert_close(whole[:, 0], features.vectors(frame))
