"""prompt.item_side mean and neighbours through the whole package: the start, training, folders, new items, indexes."""

import numpy as np
import polars as pl
import pytest
import tiny
import torch
import torch.nn.functional as F

from laserrec.config import BackboneConfig, Config
from laserrec.llm.backbone import load_backbone
from laserrec.llm.text_features import mean_outputs, whitened
from laserrec.methods.neighbours import regress
from laserrec.methods.sequence import make_id_model
from laserrec.recommender.recommender import LaserRecommender
from laserrec.retrieval.index import ExactIndex
from laserrec.util.errors import UserError

HEAD = {"whiten_dims": 8, "projection": True, "id_share": 0.3, "seen_offset": True}


@pytest.fixture(params=["prefix_first", "text_first", "two depths"])
def settings(request, llm_folder):
    depth = {"layers": 2, "mean_layers": (1, 3)} if request.param == "two depths" else {}
    layout = "text_first" if depth else request.param
    return tiny.config(llm_folder(), prompt={"max_items": 4, "max_item_tokens": 8, "layout": layout,
                                             "item_side": "mean"},
                       backbone={"name": str(llm_folder()), "precision": "fp32", **depth}, head=HEAD,
                       neighbours={"count": 6, "l2": 1.0, "text_weight": 1.0},
                       train={"lr": 1e-2, "batch_size": 16, "stage_one_epochs": 2, "stage_two_epochs": 1,
                              "item_gradient": True})


@pytest.fixture
def backbone(settings):
    return load_backbone(settings.backbone)


@pytest.fixture
def fitted(settings, backbone, tmp_path):
    data = tiny.planted(20, 40)
    model = tiny.id_model(20)
    return LaserRecommender.fit_dataset(data, model, settings, tmp_path / "model", False, backbone), data


def test_a_mean_is_over_the_items_own_text(llm):
    backbone, prompt = llm(), tiny.config("x").prompt
    rows = tiny.items(5)
    outputs = mean_outputs(backbone, prompt, rows)
    from laserrec.data.prompt import PromptEncoder

    line = PromptEncoder(backbone.tokenizer, prompt.model_copy(update={"max_item_tokens": 64})).item_tokens(rows)[3]
    read = backbone.decoder.read_rows([backbone.embed(torch.as_tensor(line, dtype=torch.long))], last_only=False)
    torch.testing.assert_close(outputs[3], read[1:].float().mean(dim=0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_means_at_several_depths_are_those_of_backbones_cut_there(llm_folder, engine):
    def means(**settings):
        config = tiny.config(llm_folder(), backbone={"name": str(llm_folder()), "precision": "fp32", "engine": engine,
                                                     **settings})
        backbone = load_backbone(config.backbone)
        return mean_outputs(backbone, config.prompt, tiny.items(7)), backbone

    both, backbone = means(layers=2, mean_layers=(1, 3))
    assert backbone.d_means == 64
    torch.testing.assert_close(both, torch.cat([means(layers=1)[0], means(layers=3)[0]], dim=1), atol=1e-5, rtol=1e-4)
    row = [backbone.embed(torch.arange(5))]  # the histories' depth is what it was
    plain = means(layers=2)[1].decoder.read_rows(row, last_only=True)
    torch.testing.assert_close(backbone.decoder.read_rows(row, last_only=True), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("settings", "message"), [
    ({"mean_layers": (3, 1)}, r"must ascend .* given \[3, 1\]"),
    ({"mean_layers": (0, 1)}, r"from 1 or more; given \[0, 1\]"),
    ({"mean_layers": (1,), "shard": True}, "empty-mean-layers")])
def test_depths_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"backbone": settings})


def test_a_depth_that_the_backbone_does_not_have(llm_folder):
    with pytest.raises(UserError, match=r"mean_layers is \(2, 4\), but .* has 3 layers; .*--backbone\.mean-layers 3,"):
        load_backbone(BackboneConfig(name=str(llm_folder()), mean_layers=(2, 4)))


def test_an_untrained_user_is_the_weighed_sum_of_her_items(settings, backbone):
    encoder = tiny.encoder(backbone, **{k: v.model_dump() for k, v in dict(settings).items()
                                     if k in ("prompt", "head", "neighbours")})
    means = encoder.catalogue.means
    encoder.laser.head.fit_whitening(means)
    users, items = encoder.encode(tiny.histories([3, 7, 5]), 4), encoder.encode_items(4)
    kept = [whitened(part, 1)[:, :8] for part in means.chunk(backbone.mean_depths, dim=1)]
    unit = F.normalize(torch.cat(kept, dim=1), dim=-1)
    want = F.normalize(unit[4] + 0.8 * unit[6] + 0.64 * unit[2], dim=-1) @ unit.T
    text = F.normalize(users[:, :-16], dim=-1) @ F.normalize(items[:, :-16], dim=-1).T
    torch.testing.assert_close(text[0], want, atol=1e-4, rtol=1e-3)


def test_what_is_trained_changes_users_and_scores_join_the_regression(fitted):
    model, data = fitted
    laser = model.encoder.laser
    assert laser.head.added.weight.abs().max() > 0
    histories = data.cases("test").histories[:5]
    users = F.normalize(model.encoder.encode(histories, 4), dim=-1)
    cosines, scores = users @ model.embeddings.T, model.score(histories)
    weights = regress(list(data.train_sequences.values()), 20, laser.neighbours.config,
                      whitened(model.encoder.catalogue.means, laser.backbone.mean_depths))
    top = weights.topk(6, dim=1)
    kept = torch.zeros_like(weights).scatter(1, top.indices, top.values.clamp(min=0))
    for row, history in enumerate(histories):
        pull, seen = torch.zeros(20), set()
        for age, item in enumerate(history[::-1].tolist()):
            if item not in seen:
                pull += 0.8**age * kept[item - 1]
                seen.add(item)
        want = laser.neighbours.temperature * torch.log(
            (cosines[row] / laser.neighbours.temperature).exp() + laser.neighbours.log_scale.exp() * pull)
        own = torch.tensor(sorted(seen)) - 1
        want[own] = cosines[row, own] + laser.seen_offset.detach()
        torch.testing.assert_close(scores[row], want, atol=1e-4, rtol=1e-4)


def test_the_folder_holds_all_of_it(fitted, tmp_path):
    model, data = fitted
    again = LaserRecommender.from_pretrained(tmp_path / "model")
    histories = data.cases("test").histories[:5]
    torch.testing.assert_close(again.score(histories), model.score(histories))
    torch.testing.assert_close(again.encoder.catalogue.means, model.encoder.catalogue.means)


def test_new_items_take_part_and_survive_the_folder(fitted, tmp_path):
    model, _ = fitted
    twin = model.items.filter(pl.col("item") == 7).select("title", "brand", "category")
    model.add_items(twin.with_columns(item_id=pl.lit("twin")))
    history = [["i6"]]
    before = model.recommend(history, k=21)
    assert before.filter(pl.col("item_id") == "twin")["rank"][0] <= 6
    score = model.score(tiny.histories([7]))[0]
    cosine = F.normalize(model.encoder.encode(tiny.histories([7]), 1), dim=-1) @ model.embeddings.T
    assert score[20] > cosine[0, 20] + 1e-4  # the history's item pulls its twin
    model.save_pretrained(tmp_path / "more")
    again = LaserRecommender.from_pretrained(tmp_path / "more").recommend(history, k=21)
    assert again["item_id"].to_list() == before["item_id"].to_list()
    np.testing.assert_allclose(again["score"], before["score"], atol=1e-5)


def test_an_exact_index_changes_nothing(fitted):
    model, data = fitted
    names = model.items["item_id"].to_list()
    histories = [[names[i - 1] for i in h] for h in data.cases("test").histories[:8]]
    plain = model.recommend(histories, k=6)
    index = ExactIndex(model.embeddings.shape[1])
    index.add(np.arange(1, 21), model.embeddings.numpy())
    model.use_index(index)
    found = model.recommend(histories, k=6)
    assert found["item_id"].to_list() == plain["item_id"].to_list()
    np.testing.assert_allclose(found["score"], plain["score"], atol=1e-5)


def test_a_mean_side_needs_the_projection(llm_folder):
    tree = tiny.config(llm_folder()).model_dump()
    with pytest.raises(ValueError, match=r"head\.projection"):
        Config.model_validate({**tree, "prompt": {**tree["prompt"], "item_side": "mean"}})


def test_id_models_take_text_of_the_same_kind(llm):
    data = tiny.planted(20, 40)
    vectors = whitened(mean_outputs(llm(), tiny.config("x").prompt, data.items), 1)
    assert make_id_model(tiny.ID_MODEL.model_copy(update={"items": "llm_start"}), 20, vectors).n_items == 20


def test_one_catalogue_is_read_once(llm, monkeypatch):
    backbone, prompt = llm(), tiny.config("x").prompt
    first = mean_outputs(backbone, prompt, tiny.items(6))
    said, reads = [], []
    read_rows = type(backbone.decoder).read_rows
    monkeypatch.setattr(type(backbone.decoder), "read_rows",
                        lambda self, *args, **kwargs: reads.append(1) or read_rows(self, *args, **kwargs))
    again = mean_outputs(backbone, prompt, tiny.items(6), said.append)
    assert torch.equal(first, again) and not reads and sum(said) == 6
    again.zero_()  # what is handed out is the caller's own
    assert torch.equal(mean_outputs(backbone, prompt, tiny.items(6)), first)
    other = mean_outputs(backbone, prompt.model_copy(update={"attributes": ()}), tiny.items(6))
    assert reads and not torch.allclose(other, first)
