"""Files of histories: the recommender's own answers, every user once, after a kill too, and mistakes named."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import polars as pl
import pytest
import torch

from laserrec.batch import engine as batch
from laserrec.batch.engine import BatchSettings, Job
from laserrec.cli.batch import _shard, batch_app
from laserrec.data.losses import LossWarning
from laserrec.recommender.indexing import build_index
from laserrec.recommender.recommender import LaserRecommender
from laserrec.retrieval.index import IndexKind
from laserrec.util.errors import UserError

N = 12


def many(users=23):
    return {100 + u: [f"i{(u * 5 + p) % N + 1}" for p in range(1 + u % 4)] for u in range(users)}


def listed(path, rows, name="items"):
    pl.DataFrame({"user_id": list(rows), name: list(rows.values())},
                 schema_overrides={name: pl.List(pl.String)}).write_parquet(path)
    return path


def long(path, rows):
    pairs = [(u, i) for u, items in rows.items() for i in items]
    pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row").write_parquet(path)
    return path


def result(out):
    return pl.concat([pl.read_parquet(f) for f in sorted(out.glob("part-*.parquet"))])


def done(job, model=None, shard=(1, 1)):
    return batch.run(job, shard, progress=False, model=model)


def listed_as_item_id(path, rows):
    return listed(path, rows, "item_id")


@pytest.mark.parametrize("write", [listed, long, listed_as_item_id])
@pytest.mark.parametrize("exclude", [False, True])
def test_the_recommenders_own_answers(model, folder, tmp_path, write, exclude):
    rows = many()
    job = Job(folder, write(tmp_path / "h.parquet", rows), tmp_path / "out", BatchSettings(3, exclude, 5))
    assert done(job) == {"users": 23, "answered": 23, "no_known_item": 0, "nothing_left": 0, "unknown_items": 0,
                         "items": sum(map(len, rows.values())), "parts": 5, "parts_missing": 0}
    want = model.recommend(rows, k=3, exclude_seen=exclude)
    got = result(tmp_path / "out")
    assert got.drop("score").equals(want.drop("score")) and got.schema == want.schema
    assert torch.allclose(torch.tensor(got["score"]), torch.tensor(want["score"]), atol=1e-4)


def test_users_without_an_answer_have_a_row_and_are_counted(model, folder, tmp_path):
    rows = {"a": ["i1"], "b": [], "c": ["nope"], "d": ["nope", "i2"], "e": [f"i{i + 1}" for i in range(N)], "f": None}
    job = Job(folder, listed(tmp_path / "h.parquet", rows), tmp_path / "out", BatchSettings(2, True, chunk=4))
    with pytest.warns(LossWarning, match="3 of 6 users have no known item"):
        numbers = done(job, model)
    assert numbers == {"users": 6, "answered": 2, "no_known_item": 3, "nothing_left": 1, "items": 16,
                       "unknown_items": 2, "parts": 2, "parts_missing": 0}
    assert json.loads((job.out / "done.json").read_text()) == numbers
    got = result(job.out)
    assert got["user_id"].unique(maintain_order=True).to_list() == list(rows)
    empty = got.filter(pl.col("item_id").is_null())
    assert empty.rows() == [(user, None, None, None) for user in ("b", "c", "e", "f")]
    assert got.filter(user_id="d")["rank"].to_list() == [1, 2]


def test_unknown_items_stop_it_where_asked(model, folder, tmp_path):
    rows = {"a": ["i1"], "b": ["i2", "nope"]}
    strict = BatchSettings(2, unknown="error")
    job = Job(folder, listed(tmp_path / "h.parquet", rows), tmp_path / "out", strict)
    with pytest.raises(UserError, match=r"h\.parquet: history of user 'b': 1 unknown item ids, first \['nope'\]"):
        done(job, model)
    assert not job.out.exists()
    with pytest.warns(LossWarning, match="1 of 3 items"):  # its own advice, in the same folder
        assert done(replace(job, settings=BatchSettings(2)), model)["answered"] == 2
    with pytest.raises(UserError, match="history of user 'b': it is empty"):
        done(Job(folder, listed(tmp_path / "e.parquet", {"a": ["i1"], "b": []}), tmp_path / "e", strict), model)


def test_nothing_known_at_all_is_an_error(model, folder, tmp_path):
    job = Job(folder, listed(tmp_path / "h.parquet", {"a": ["I1"], "b": ["I2"]}), tmp_path / "out")
    message = "no item of the histories is in the catalogue: upper and lower case differ"
    for _ in range(2):  # a resumed run says so too
        with pytest.raises(UserError, match=message):
            done(job, model)
    assert not list(job.out.iterdir())
    done(replace(job, histories=listed(tmp_path / "mended.parquet", {"a": ["i1"], "b": ["i2"]})), model)


def test_of_two_runs_at_the_same_time_one_alone_has_the_folder(model, folder, tmp_path):
    job = Job(folder, listed(tmp_path / "h.parquet", many()), tmp_path / "out", BatchSettings(2, chunk=5))
    jobs = [job, replace(job, settings=BatchSettings(3, chunk=5))]
    plans = [batch.plan(job) for job in jobs]
    first, late = (batch.Worker(job, plan.source, plan.manifest, model) for job, plan in zip(jobs, plans, strict=True))
    first.write(plans[0].todo[0])
    with pytest.raises(UserError, match="begun with another k"):
        late.write(plans[1].todo[1])
    assert batch.parts_in(job.out) == 1
    assert done(job, model)["parts_missing"] == 0


def test_a_timestamp_orders(model, folder, tmp_path):
    frame = pl.DataFrame({"user_id": [1, 1, 1, 2, 2], "item_id": ["i3", "i1", "i2", "i9", "i8"],
                          "timestamp": [3, 1, 2, 9, 8]})
    frame.write_parquet(tmp_path / "h.parquet")
    done(Job(folder, tmp_path / "h.parquet", tmp_path / "out", BatchSettings(4)), model)
    want = model.recommend({1: ["i1", "i2", "i3"], 2: ["i8", "i9"]}, k=4)
    assert result(tmp_path / "out").drop("score").equals(want.drop("score"))


def test_excluded_items(model, folder, tmp_path):
    rows = many(6)
    file, everyone = listed(tmp_path / "h.parquet", rows), BatchSettings(N, chunk=2, exclude=("i3", "nope"))
    own = tmp_path / "own.csv"
    own.write_text("user_id,item_id\n101,i4\n101,i5\n104,nope\n105,i6\n999,i7\n")
    done(Job(folder, file, tmp_path / "all", everyone), model)
    done(Job(folder, file, tmp_path / "own", everyone, exclude_file=own), model)
    found = {name: dict(result(tmp_path / name).group_by("user_id").agg("item_id").iter_rows())
             for name in ("all", "own")}
    catalogue = {f"i{i}" for i in range(1, N + 1)}
    for user in rows:
        assert set(found["all"][user]) == catalogue - {"i3"}
        assert set(found["own"][user]) == catalogue - {"i3"} - {101: {"i4", "i5"}, 105: {"i6"}}.get(user, set())
    own.write_text("item_id\ni4\n")
    with pytest.raises(UserError, match="begun with another exclude"):
        done(Job(folder, file, tmp_path / "own", everyone, exclude_file=own), model)
    done(Job(folder, file, tmp_path / "list", everyone, exclude_file=own), model)
    assert set(result(tmp_path / "list")["item_id"]) == catalogue - {"i3", "i4"}
    own.write_text("item\ni4\n")
    with pytest.raises(UserError, match="give the columns user_id and item_id, or item_id alone; there are: item"):
        done(Job(folder, file, tmp_path / "bad", everyone, exclude_file=own), model)


def test_text_files_of_another_separator_and_encoding(model, folder, tmp_path):
    (tmp_path / "h.csv").write_text("user_id;item_id\nBär;i1\nBär;i2\nanna;i3\n", encoding="cp1252")
    (tmp_path / "own.csv").write_text("user_id;item_id\nBär;i4\n", encoding="cp1252")
    out = tmp_path / "out"
    command = [str(folder), str(tmp_path / "h.csv"), str(out), "--k", str(N), "--exclude-file",
               str(tmp_path / "own.csv"), "--device", "cpu", "--quiet"]
    for wrong, message in (([], r"h\.csv:2: not UTF-8 .* --encoding cp1252 .*\. Mend the line$"),
                           (["--encoding", "cp1252"], 'separated by .;.; set --separator ";" '),
                           (["--encoding", "none"], "unknown encoding 'none'")):
        with pytest.raises(UserError, match=message):
            batch_app([*command, *wrong], exit_on_error=False, result_action="return_value")
    reading = ["--separator", ";", "--encoding", "cp1252"]
    batch_app([*command, *reading], exit_on_error=False, result_action="return_value")
    found = dict(result(out).group_by("user_id").agg("item_id").iter_rows())
    assert found.keys() == {"Bär", "anna"} and len(found["anna"]) == N and len(found["Bär"]) == N - 1
    with pytest.raises(UserError, match="begun with another encoding"):
        batch_app([*command, *reading[:2], "--encoding", "latin-1"], exit_on_error=False, result_action="return_value")


def test_exclusions_that_bar_nothing_are_told_once(model, folder, tmp_path):
    file, own = listed(tmp_path / "h.parquet", many(6)), tmp_path / "own.csv"
    items, users = "none of its item ids is in the catalogue: ", "none of its users has a history here: "
    for number, (named, text, message) in enumerate((
            ("I3", None, f"exclude has no effect, {items}upper and lower case differ; yours are like 'I3', the"),
            ("i3", "item_id\nI4\n", f"{own} has no effect, {items}upper and lower case differ"),
            ("i3", "user_id,item_id\n101,I4\n", f"{own} has no effect, {items}upper and lower case differ"),
            ("i3", "user_id,item_id\n0101,i4\n", f"{own} has no effect, {users}leading zeros are missing"))):
        if text is not None:
            own.write_text(text)
        job = Job(folder, file, tmp_path / str(number), BatchSettings(2, chunk=2, exclude=(named,)),
                  exclude_file=None if text is None else own)
        with pytest.warns(LossWarning, match=f"^{message}") as told:
            done(job, model)
        assert len(told) == 1
    own.write_text("user_id,item_id\n101,i4\n999,nope\n")
    job = Job(folder, file, tmp_path / "some", BatchSettings(2, exclude=("i3", "nope")), exclude_file=own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done(job, model)


def test_mistakes_in_the_file_of_exclusions(model, folder, tmp_path):
    file, own = listed(tmp_path / "h.parquet", many(3)), tmp_path / "own.csv"
    for number, (text, message) in enumerate((
            ("user_id,item_id\n101,i4\n ,i5\n", r"own\.csv:3, column user_id: empty id"),
            ("user_id;item_id\n101;i4\n", 'own.csv: give the columns .* separated by .;.; set --separator ";" '),
            ("user_id,item_id\n101,i4,x\n", r"own\.csv:2: 3 fields, the header has 2\. Mend the line$"),
            ("user_id,item\n101,i4\n", r"own\.csv: .* no column for item_id"))):
        own.write_text(text)
        with pytest.raises(UserError, match=message):
            done(Job(folder, file, tmp_path / str(number), exclude_file=own), model)
    own.write_text("user_id,item_id\n")
    assert done(Job(folder, file, tmp_path / "none", exclude_file=own), model)["answered"] == 3


def test_killed_and_resumed_nothing_is_lost_or_doubled(model, folder, tmp_path):
    rows = many(400)
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
    done(Job(folder, file, out, BatchSettings(3, chunk=4)), model)
    assert all((out / name).stat().st_mtime_ns == at for name, at in before.items())  # not done twice
    got = result(out)
    assert got["user_id"].unique(maintain_order=True).to_list() == list(rows) and got.height == 3 * len(rows)
    assert sorted(p.name for p in out.iterdir()) == sorted([f"part-{i:06}.parquet" for i in range(100)]
                                                           + ["manifest.json", "done.json"])


def test_shards_fill_one_folder(model, folder, tmp_path):
    rows = many()
    job = Job(folder, listed(tmp_path / "h.parquet", rows), tmp_path / "out", BatchSettings(2, chunk=4))
    first = done(job, model, (1, 2))
    assert first["parts_missing"] == 3 and first["answered"] == 12
    second = done(job, model, (2, 2))
    assert second["parts_missing"] == 0 and result(job.out)["user_id"].n_unique() == len(rows) == second["answered"]


def test_through_an_index(model, folder, tmp_path):
    file, settings = listed(tmp_path / "h.parquet", many()), BatchSettings(3, chunk=5)
    done(Job(folder, file, tmp_path / "plain", settings), model)
    build_index(model, IndexKind.EXACT, tmp_path / "index", queries=5)
    done(Job(folder, file, tmp_path / "out", settings, tmp_path / "index"))
    got, want = result(tmp_path / "out"), result(tmp_path / "plain")
    assert got.drop("score").equals(want.drop("score"))
    assert torch.allclose(torch.tensor(got["score"]), torch.tensor(want["score"]), atol=1e-6)
    with pytest.raises(UserError, match="begun with another index"):
        done(Job(folder, file, tmp_path / "plain", settings, tmp_path / "index"))


def test_another_input_model_or_setting_is_refused(model, folder, tmp_path):
    job = Job(folder, listed(tmp_path / "h.parquet", many()), tmp_path / "out", BatchSettings(2))
    done(job, model)
    other = listed(tmp_path / "other.parquet", many(9))
    for changed, message in (({"settings": BatchSettings(3)}, "begun with another k"),
                             ({"settings": BatchSettings(2, unknown="error")}, "begun with another unknown"),
                             ({"histories": other}, "begun with another input"),
                             ({"model": tmp_path, "out": tmp_path / "none"}, "is not a model folder")):
        with pytest.raises(UserError, match=message):
            done(Job(**{**vars(job), **changed}), model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for name, message in (("full", "holds other files"), ("file", "is a file; name a folder")):
        with pytest.raises(UserError, match=message):
            done(Job(folder, job.histories, tmp_path / name), model)
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / ".manifest.json.1-abc.tmp").touch()  # another shard is just about to begin, or was killed
    done(Job(folder, job.histories, tmp_path / "near"), model)


@pytest.mark.parametrize(("name", "content"), [
    ("manifest.json", "[]"), ("manifest.json", "{"), ("part-000000.parquet", "junk"), ("part-000000.parquet", "")])
def test_a_damaged_folder_is_named(model, folder, tmp_path, name, content):
    job = Job(folder, listed(tmp_path / "h.parquet", many()), tmp_path / "out")
    done(job, model)
    (job.out / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        done(job, model)


def test_a_finished_run_loads_no_model(model, folder, tmp_path, monkeypatch):
    job = Job(folder, listed(tmp_path / "h.parquet", many()), tmp_path / "out")
    numbers = done(job, model)
    monkeypatch.setattr(LaserRecommender, "from_pretrained", lambda *args, **more: pytest.fail("loaded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert done(job) == numbers


def test_settings_that_cannot_be():
    for settings, message in (({"k": 0}, "k is 0"), ({"chunk": 0}, "chunk is 0"), ({"unknown": "skip"}, "not 'skip'")):
        with pytest.raises(UserError, match=message):
            BatchSettings(**settings)


def test_options_of_ray_are_for_ray_alone():
    for option in ("--workers", "--address", "--num-gpus"):
        with pytest.raises(UserError, match="are for --engine ray"):
            batch_app(["model", "h.parquet", "out", option, "3"], exit_on_error=False)
    for option, value in (("--workers", "0"), ("--num-gpus", "-1")):
        with pytest.raises(UserError, match="give at least 1 worker and 0 GPUs"):
            batch_app(["model", "h.parquet", "out", "--engine", "ray", option, value], exit_on_error=False)


def test_shard_is_read():
    assert _shard("2/8") == (2, 8)
    for text in ("0/2", "3/2", "x", "1", "1/", "-1/2"):
        with pytest.raises(UserError, match="give I/N"):
            _shard(text)
