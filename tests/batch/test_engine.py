"""Files of histories: the recommender's own answers, every user once, after a kill too, and mistakes named."""

import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import tiny
import torch

from laserrec import LaserRecommender
from laserrec.batch import engine as batch
from laserrec.batch.engine import BatchSettings, HistoryFile
from laserrec.cli.batch import _shard, batch_app
from laserrec.retrieval.build import build_index
from laserrec.retrieval.index import IndexKind
from laserrec.util.errors import UserError

N = 12


@pytest.fixture(scope="module")
def folder(llm, llm_folder, tmp_path_factory):
    config = tiny.config(llm_folder(), prompt={"layout": "text_first", "max_items": 4, "max_item_tokens": 8},
                         train={"stage_one_epochs": 0, "stage_two_epochs": 0})
    out = tmp_path_factory.mktemp("batch") / "model"
    LaserRecommender.fit_dataset(tiny.planted(N, users=16), tiny.id_model(N), config, out, False, llm())
    return out


@pytest.fixture
def model(folder, llm):
    return LaserRecommender.from_pretrained(folder, llm())


def histories(users=23):
    return {100 + u: [f"i{(u * 5 + p) % N + 1}" for p in range(1 + u % 4)] for u in range(users)}


def listed(path, rows):
    pl.DataFrame({"user_id": list(rows), "items": list(rows.values())}).write_parquet(path)
    return path


def long(path, rows):
    pairs = [(u, i) for u, items in rows.items() for i in items]
    pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row").write_parquet(path)
    return path


def result(out):
    return pl.concat([pl.read_parquet(f) for f in sorted(out.glob("part-*.parquet"))])


@pytest.mark.parametrize("write", [listed, long])
@pytest.mark.parametrize("exclude", [False, True])
def test_the_recommenders_own_answers(model, folder, tmp_path, write, exclude):
    rows = histories()
    file = write(tmp_path / "h.parquet", rows)
    numbers = batch.run(model, folder, file, tmp_path / "out", BatchSettings(3, exclude, 5), progress=False)
    assert numbers == {"users": 23, "skipped": 0, "parts": 5, "parts_missing": 0}
    want = model.recommend(rows, k=3, exclude_seen=exclude)
    got = result(tmp_path / "out")
    assert got.drop("score").equals(want.drop("score")) and got.schema == want.schema
    assert torch.allclose(torch.tensor(got["score"]), torch.tensor(want["score"]), atol=1e-4)


def test_users_without_a_known_item_are_named(model, folder, tmp_path):
    rows = {"a": ["i1"], "b": [], "c": ["nope"], "d": ["nope", "i2"]}
    file = listed(tmp_path / "h.parquet", rows)
    numbers = batch.run(model, folder, file, tmp_path / "out", BatchSettings(2, chunk=3), progress=False)
    assert numbers["skipped"] == 2 and result(tmp_path / "out")["user_id"].unique().sort().to_list() == ["a", "d"]
    left = pl.read_parquet(tmp_path / "out" / "skipped" / "part-000000.parquet")
    assert left.rows() == [("b", "empty history"), ("c", "no known item")]
    with pytest.raises(UserError, match=r"user 'c' holds unknown items.*nope"):
        batch.run(model, folder, file, tmp_path / "strict", BatchSettings(2, unknown="error"), progress=False)


def test_killed_and_resumed_nothing_is_lost_or_doubled(model, folder, tmp_path):
    rows = histories(400)
    file, out = listed(tmp_path / "h.parquet", rows), tmp_path / "out"
    command = [sys.executable, "-m", "laserrec", "batch", str(folder), str(file), str(out), "--chunk", "4", "--quiet",
               "--k", "3"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while len(list(out.glob("part-*.parquet"))) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {f.name: f.stat().st_mtime_ns for f in out.glob("part-*.parquet")}
    assert 3 <= len(before) < 100 and not (out / "done.json").exists()
    batch.run(model, folder, file, out, BatchSettings(3, chunk=4), progress=False)
    assert all((out / name).stat().st_mtime_ns == at for name, at in before.items())  # not done twice
    got = result(out)
    assert got["user_id"].unique(maintain_order=True).to_list() == list(rows) and got.height == 3 * len(rows)
    assert (out / "done.json").exists() and len(list(out.glob("*.parquet"))) == 100


def test_shards_fill_one_folder(model, folder, tmp_path):
    rows = histories()
    file, settings = listed(tmp_path / "h.parquet", rows), BatchSettings(2, chunk=4)
    first = batch.run(model, folder, file, tmp_path / "out", settings, (1, 2), progress=False)
    assert first["parts_missing"] == 3
    second = batch.run(model, folder, file, tmp_path / "out", settings, (2, 2), progress=False)
    assert second["parts_missing"] == 0 and result(tmp_path / "out")["user_id"].n_unique() == len(rows)


@pytest.mark.parametrize("kind", list(IndexKind))
def test_through_an_index(model, folder, tmp_path, kind):
    file = listed(tmp_path / "h.parquet", histories())
    batch.run(model, folder, file, tmp_path / "plain", BatchSettings(3, chunk=5), progress=False)
    build_index(model, kind, tmp_path / "index", queries=5)
    model.use_index(tmp_path / "index")
    batch.run(model, folder, file, tmp_path / "out", BatchSettings(3, chunk=5), progress=False)
    got, want = result(tmp_path / "out"), result(tmp_path / "plain")
    assert got.drop("score").equals(want.drop("score"))
    assert torch.allclose(torch.tensor(got["score"]), torch.tensor(want["score"]), atol=1e-6)
    with pytest.raises(UserError, match="begun with another index"):
        batch.run(model, folder, file, tmp_path / "plain", BatchSettings(3, chunk=5), progress=False)


def test_a_folder_from_before_there_were_indexes_is_gone_on_with(model, folder, tmp_path):
    file, out = listed(tmp_path / "h.parquet", histories()), tmp_path / "out"
    batch.run(model, folder, file, out, BatchSettings(2, chunk=4), (1, 2), progress=False)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest.pop("index") is None
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert batch.run(model, folder, file, out, BatchSettings(2, chunk=4), progress=False)["parts_missing"] == 0


def test_another_input_model_or_setting_is_refused(model, folder, tmp_path):
    file, out = listed(tmp_path / "h.parquet", histories()), tmp_path / "out"
    batch.run(model, folder, file, out, BatchSettings(2), progress=False)
    with pytest.raises(UserError, match="begun with another k"):
        batch.run(model, folder, file, out, BatchSettings(3), progress=False)
    other = listed(tmp_path / "other.parquet", histories(9))
    with pytest.raises(UserError, match="begun with another input"):
        batch.run(model, folder, other, out, BatchSettings(2), progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="holds other files"):
        batch.run(model, folder, file, tmp_path / "full", BatchSettings(2), progress=False)
    with pytest.raises(UserError, match="is not a model folder"):
        batch.run(model, tmp_path, file, tmp_path / "none", BatchSettings(2), progress=False)
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / ".manifest.json.1-abc.tmp").touch()  # another shard is just about to begin, or was killed
    batch.run(model, folder, file, tmp_path / "near", BatchSettings(2), progress=False)


@pytest.mark.parametrize(("frame", "message"), [
    ({"user_id": [1], "item": ["i1"]}, "give the columns user_id and items"),
    ({"user_id": [1], "items": ["i1"]}, "give the columns user_id and items .a list"),
    ({"user_id": [1, None], "item_id": ["i1", "i2"]}, "row 2 has no user_id"),
    ({"user_id": [1, 2, 1], "item_id": ["i1", "i2", "i3"]}, "user 1 comes again at row 3; sort the file"),
    ({"user_id": [1, 2, 2], "items": [["i1"], ["i2"], ["i3"]]}, "row 3 has another row before"),
])
def test_bad_files_are_named(frame, message, tmp_path):
    pl.DataFrame(frame).write_parquet(tmp_path / "h.parquet")
    with pytest.raises(UserError, match=message):
        _ = HistoryFile(tmp_path / "h.parquet").n_users


def test_no_file_and_no_parquet(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        HistoryFile(tmp_path / "none.parquet")
    (tmp_path / "h.parquet").write_text("user_id,items")
    with pytest.raises(UserError, match="not a Parquet file"):
        HistoryFile(tmp_path / "h.parquet")


def test_options_of_ray_are_for_ray_alone():
    for option in ("--workers", "--address"):
        with pytest.raises(UserError, match="are for --engine ray"):
            batch_app(["model", "h.parquet", "out", option, "3"], exit_on_error=False)
    with pytest.raises(UserError, match="workers is 0"):
        batch_app(["model", "h.parquet", "out", "--engine", "ray", "--workers", "0"], exit_on_error=False)


def test_shard_is_read():
    assert _shard("2/8") == (2, 8)
    for text in ("0/2", "3/2", "x", "1", "1/", "-1/2"):
        with pytest.raises(UserError, match="give I/N"):
            _shard(text)
