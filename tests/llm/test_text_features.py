"""Whitened text vectors: what they are, that nothing but the catalogue is in them, and that each text is read once."""

import socket
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import tiny
import torch

from laserrec.config import BackboneConfig, PromptConfig
from laserrec.llm import text_features
from laserrec.llm.text_features import TextFeatures, whitened
from laserrec.util import checkpoint
from laserrec.util.device import CPU
from laserrec.util.errors import UserError

PROMPT = PromptConfig(layout="text_first")
ITEMS = tiny.items(70)  # two chunks


def features(llm_folder, folder: Path | None = None, items_of: str = "llama", **settings) -> TextFeatures:
    config = BackboneConfig(name=str(llm_folder(items_of)), **{"precision": "fp32", **settings})
    return TextFeatures(config, PROMPT, CPU, folder)


@pytest.fixture
def counted(monkeypatch):
    """How often the LLM was loaded and how many texts it read."""
    counts, load, read = {"loaded": 0, "read": 0}, text_features.load_backbone, text_features._chunk_means

    def loading(*given, **more):
        counts["loaded"] += 1
        return load(*given, **more)

    def reading(backbone, lines):
        counts["read"] += len(lines)
        return read(backbone, lines)

    monkeypatch.setattr(text_features, "load_backbone", loading)
    monkeypatch.setattr(text_features, "_chunk_means", reading)
    return counts


def test_rows_are_white(llm_folder):
    vectors = features(llm_folder).vectors(tiny.items(90))
    assert vectors.shape == (90, 32)
    covariance = vectors.double().T @ vectors.double() / 90
    torch.testing.assert_close(covariance, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-2)
    assert len(vectors.unique(dim=0)) > 30  # titles are cut after eight tokens, so that some read alike


def test_other_users_give_the_same_vectors(llm_folder, llm):
    config = tiny.config(llm_folder(), id_model={**tiny.ID_MODEL.model_dump(), "items": "text"})
    few, many = (tiny.features(llm(), config).vectors(tiny.planted(20, *given).items) for given in ((30, 0), (50, 4)))
    assert torch.equal(few, many)


@pytest.mark.parametrize("depths", [(), (1, 3)])
def test_vectors_are_whitened_means(llm_folder, depths):
    own = features(llm_folder, mean_layers=depths)
    means = own.means(ITEMS)
    assert torch.equal(own.vectors(ITEMS), whitened(means, max(1, len(depths))))
    assert torch.equal(own.vectors(ITEMS, fit_rows=40), whitened(means, max(1, len(depths)), 40))
    assert not torch.allclose(own.vectors(ITEMS, fit_rows=40), own.vectors(ITEMS))


@pytest.mark.parametrize("depths", [(), (1, 3)])
def test_a_mean_is_taken_over_all_tokens_but_the_first(llm, llm_folder, depths):
    own, cut = features(llm_folder, mean_layers=depths), [llm(layers=layers) for layers in depths] or [llm()]
    means = own.means(ITEMS)
    for row in (0, 41):
        [line] = own._encoder.item_tokens(ITEMS[row : row + 1])
        outputs = [each.decoder(each.embed(each.tokens(line[None])))[0, 1:].mean(dim=0) for each in cut]
        torch.testing.assert_close(means[row], torch.cat(outputs), rtol=1e-4, atol=1e-5)


def test_a_catalogue_is_read_once(llm_folder, counted):
    own = features(llm_folder)
    first = own.means(ITEMS)
    kept = first.clone()
    first.zero_()  # a caller may do as he likes with what he got
    assert torch.equal(own.means(ITEMS), kept) and counted == {"loaded": 1, "read": 70}
    own.means(ITEMS[:5])
    assert counted == {"loaded": 1, "read": 75}


def test_equal_texts_are_read_once(llm_folder, counted):
    twice = ITEMS[[*range(70), 3, *range(70)]]
    assert torch.equal(features(llm_folder).means(twice), features(llm_folder).means(ITEMS)[twice["item"].to_list()])
    assert counted["read"] == 140
    no_text = ITEMS.with_columns(pl.lit(None, pl.String).alias(name) for name in ("title", "brand", "category"))
    vectors = features(llm_folder).vectors(no_text)
    assert vectors.shape == (70, 32) and not vectors.any() and counted["read"] == 141


def test_a_folder_saves_the_loading_too(llm_folder, tmp_path, counted):
    first = features(llm_folder, tmp_path / "new" / "text").means(ITEMS)
    again = features(llm_folder, tmp_path / "new" / "text")
    assert torch.equal(again.means(ITEMS), first) and counted == {"loaded": 1, "read": 70}


def test_other_texts_weights_depths_or_precision_are_other_files(llm_folder, tmp_path, counted):
    first = features(llm_folder, tmp_path).means(ITEMS)
    for items, settings in ((ITEMS[:69], {}), (ITEMS, {"items_of": "qwen2"}), (ITEMS, {"mean_layers": (2,)}),
                            (ITEMS, {"layers": 1}), (ITEMS, {"precision": "bf16"})):
        other = features(llm_folder, tmp_path, **settings).means(items)
        assert not torch.equal(other, first[: len(items)]) or settings == {}
    assert counted["read"] == 70 + 69 + 4 * 70 and len(list(tmp_path.glob("*.safetensors"))) == 6


@pytest.mark.parametrize("damage", ["cut", "rows", "name", "nothing in it"])
def test_a_damaged_file_is_read_anew_and_replaced(llm_folder, tmp_path, counted, damage):
    first = features(llm_folder, tmp_path).means(ITEMS)
    [file] = tmp_path.glob("*.safetensors")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        facts = {"fingerprint": "another" if damage == "name" else file.stem}
        tensors = {"rows": {"means": first[1:]}, "name": {"means": first + 1}}.get(damage, {})
        checkpoint.save(file, tensors, facts)
    assert torch.equal(features(llm_folder, tmp_path).means(ITEMS), first) and counted["read"] == 140
    assert torch.equal(checkpoint.load(file)[0]["means"], first)


def test_no_items_are_no_rows(llm_folder, tmp_path):
    assert features(llm_folder, tmp_path).means(ITEMS[:0]).shape == (0, 32)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_none_is_a_clear_error(llm_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"folder of text features .*file can't be written"):
        features(llm_folder, tmp_path / "file").means(ITEMS)


def test_other_weights_than_the_expected_are_refused_even_if_their_means_are_kept(llm_folder, tmp_path):
    features(llm_folder, tmp_path).means(ITEMS)
    own = features(llm_folder, tmp_path)
    own.expect(own.sha256, "runs/model")
    own.means(ITEMS)
    own = features(llm_folder, tmp_path)
    own.expect("0" * 64, "runs/model")
    with pytest.raises(UserError, match=r"runs/model was fitted with .*0000.*means nothing to other weights"):
        own.means(ITEMS)


TWO = """
import sys, time
import tiny
from pathlib import Path
from laserrec.llm import text_features
from test_text_features import ITEMS, features

read, started = text_features._chunk_means, Path(sys.argv[3])

def slowly(backbone, lines):
    with open(started, "a") as file:
        file.write(f"{len(lines)}\\n")
    time.sleep(1.0)
    return read(backbone, lines)

text_features._chunk_means = slowly
features(lambda family: sys.argv[1], Path(sys.argv[2])).means(ITEMS)
"""


def test_of_two_processes_one_reads_and_one_waits(llm_folder, tmp_path):
    command = [sys.executable, "-c", TWO, str(llm_folder()), str(tmp_path / "text"), str(tmp_path / "read")]
    here = Path(__file__).parent
    both = [subprocess.Popen(command, env={"PYTHONPATH": f"{here}:{here.parent}:{here.parents[1]}"}) for _ in range(2)]
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    assert sorted((tmp_path / "read").read_text().split()) == ["6", "64"]
    [file] = (tmp_path / "text").glob("*.safetensors")
    assert torch.equal(checkpoint.load(file)[0]["means"], features(llm_folder).means(ITEMS))


TOGETHER = """
import os, sys
from pathlib import Path
from laserrec.llm import text_features
from laserrec.llm.text_features import TextFeatures
from laserrec.util import checkpoint
from laserrec.util.distributed import join
from test_text_features import ITEMS, features

read, seen, world = text_features._chunk_means, [], join()
text_features._chunk_means = lambda backbone, lines: seen.append(len(lines)) or read(backbone, lines)
own = features(lambda family: sys.argv[1], Path(sys.argv[2]) / "text")
own.world = world
means = own.means(ITEMS)
again = features(lambda family: sys.argv[1], Path(sys.argv[2]) / "text")
again.world = world
checkpoint.save(Path(sys.argv[2]) / f"{world.rank}.safetensors", {"means": means, "again": again.means(ITEMS)},
                {"seen": seen, "loaded": again._loaded is not None})
"""


def test_processes_of_one_run_share_the_reading(llm_folder, tmp_path):
    here = Path(__file__).parent
    common = {"PYTHONPATH": f"{here}:{here.parent}:{here.parents[1]}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, "-c", TOGETHER, str(llm_folder()), str(tmp_path)],
                             env=common | {"RANK": str(rank)}) for rank in (0, 1)]
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    want = features(llm_folder).means(ITEMS)
    for rank, read in enumerate(([64], [6])):
        tensors, facts = checkpoint.load(tmp_path / f"{rank}.safetensors")
        assert torch.equal(tensors["means"], want) and torch.equal(tensors["again"], want)
        assert facts == {"seen": read, "loaded": False}


def free_port() -> int:
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        return at.getsockname()[1]


def test_memory_is_looked_at_before_the_texts_are_read(llm, monkeypatch):
    monkeypatch.setattr(text_features, "available_bytes", lambda: 3 * 4 * 12 * 32 - 1)
    monkeypatch.setattr(text_features, "_means", lambda *args: pytest.fail("it reads"))
    with pytest.raises(UserError, match=r"the text vectors of 12 items take 0\.0 GB of memory"):
        tiny.features(llm()).means(tiny.items(12))
