"""Two processes train as one would: same gradients, same models, one writer, one voice, stopped at one step."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import several
import tiny
import torch

from laserrec.cli import main as cli
from laserrec.config import BackboneConfig, load_config
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare
from laserrec.data.raw import from_frames
from laserrec.llm.backbone import load_backbone
from laserrec.recommender.recommender import LaserRecommender
from laserrec.training.watch import read_training
from laserrec.util import checkpoint, distributed
from laserrec.util.distributed import World
from laserrec.util.errors import UserError

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 600
"""They need about ten on an idle machine."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def environment(**more: str) -> dict[str, str]:
    """As a launcher makes it, on loopback, without what this process may have been told."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


def launch(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([*TORCHRUN, *map(str, command)], capture_output=True, text=True, timeout=LIMIT_SECONDS,
                          env=environment())


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


TINY = """
[data]
min_user_interactions = 2
min_item_interactions = 1
[prompt]
template = "no_instruction"
max_items = 2
max_item_tokens = 4
[mformer]
experts = 2
queries = 2
blocks = 1
d_model = 16
heads = 2
dropout = 0.0
[head]
whiten_dims = 8
dropout = 0.0
[train]
stage_one_epochs = 1
stage_two_epochs = 1
batch_size = 7
[backbone]
layers = 2
mean_layers = [1, 3]
name = "{folder}"
"""


@pytest.fixture(scope="module")
def steps(llm_folder, tmp_path_factory):
    """Data folder, ID-model folder, and settings file (precision auto)."""
    folder = tmp_path_factory.mktemp("steps")
    (folder / "tiny.toml").write_text(TINY.replace("{folder}", str(llm_folder())), encoding="utf-8")
    raw = from_frames(*tiny.planted_tables(10, users=12))
    prepare(raw.interactions, raw.items, load_config("small", folder / "tiny.toml").data, folder / "data")
    below = tiny.config(llm_folder(), id_model=tiny.ID_MODEL.model_dump() | {"max_epochs": 1})
    LaserRecommender.fit_dataset(Dataset.load(folder / "data"), below, folder / "ids", "sasrec", progress=False)
    return folder


# -- sharing out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [0, 1, 4, 5, 11])
def test_shares_are_all_of_the_work(size, n):
    shares = [World(rank, size).share(n) for rank in range(size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    even = [World(rank, size).even_share(n) for rank in range(size)]
    assert len({len(s) for s in even}) == 1
    assert np.stack(even, axis=1).flatten()[:n].tolist() == list(range(n))


def test_one_process_draws_as_if_nothing_were_there():
    torch.manual_seed(3)
    plain = torch.rand(5)
    torch.manual_seed(3)
    with World().own_randomness(1, 2):
        first = torch.rand(2)
    assert torch.equal(torch.cat([first, torch.rand(3)]), plain)


def test_several_draw_apart_and_stay_together():
    torch.manual_seed(3)
    plain = torch.rand(5)
    drawn = []
    for rank in (0, 1):
        torch.manual_seed(3)
        for step in (1, 2):
            with World(rank, 2).own_randomness(0, step):
                drawn.append(torch.rand(4))
        assert torch.equal(torch.rand(5), plain)
    assert len({tuple(d.tolist()) for d in drawn}) == 4


# -- two processes beside one -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(llm_folder):
    """The LLM as this process loads it."""
    return load_backbone(BackboneConfig(name=str(llm_folder()), precision="fp32"))


def interrupted(fit, at: int) -> None:
    step, calls = fit._step, []

    def counted(batch, lengths):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return step(batch, lengths)

    fit._step = counted
    with pytest.raises(KeyboardInterrupt):
        fit.run()


@pytest.fixture(scope="module")
def two(llm_folder, one, steps, tmp_path_factory):
    """The folder with what two processes found (tests/several.py)."""
    out = tmp_path_factory.mktemp("two")
    interrupted(several.quick_fit(one, out / "one-then-two", World(), several.SETTINGS["text_first"]), at=9)
    done = launch(ROOT / "tests" / "several.py", llm_folder(), steps, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(one, tmp_path_factory):
    """name -> a fit of one process without a stop."""
    made = {}

    def fitted(name: str):
        if name not in made:
            made[name] = several.quick_fit(one, tmp_path_factory.mktemp(name), World(), several.SETTINGS[name])
            made[name].run()
        return made[name]

    return fitted


@pytest.fixture(scope="module")
def whole(alone):
    """name -> what it found."""
    return lambda name: several.found(alone(name))


def test_the_tools_of_two(two):
    for rank in (0, 1):
        facts = json.loads((two / f"tools-{rank}.json").read_text())
        assert facts["gathered"] == [[float(i), i * 10.0] for i in range(5)]
        assert facts["gradient"] == [1.0, 2.0] and facts["never"] and facts["loss"] == 2.0 and facts["seven"] == 7.0
        assert facts["most"] == 5 and facts["any"] and not facts["none"] and facts["followed"] == 0.0
        assert facts["value"] == {"epoch": 3}
        assert facts["tensors"] == {"bytes": ["torch.uint8", [7, 8]], "one": ["torch.int64", 3],
                                    "none": ["torch.float32", []], "half": ["torch.bfloat16", [1.0, 1.0]]}
        assert facts["share"] == [[0, 2], [1]][rank] and facts["empty"] == [[0], []][rank]


@pytest.mark.parametrize("name", several.SETTINGS)
def test_the_gradient_is_that_of_one_process(one, two, tmp_path, name):
    want = several.gradients(several.quick_fit(one, tmp_path, World(), several.SETTINGS[name]))
    assert len(want) > 2
    for rank in (0, 1):
        assert_close(checkpoint.load(two / f"{name}-gradient-{rank}.safetensors")[0], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", several.SETTINGS)
def test_the_fit_is_that_of_one_process(two, whole, name):
    """Losses, validation, trained tensors and item embeddings."""
    for rank in (0, 1):
        assert_close(checkpoint.load(two / f"{name}-{rank}.safetensors")[0], whole(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", several.SETTINGS)
def test_the_curves_are_those_of_one_process(two, alone, name):
    """The first process writes what all of them did."""
    curves, want = read_training(two / name), read_training(alone(name).folder)
    assert [(e["step"], e["examples"]) for e in curves] == [(e["step"], e["examples"]) for e in want]
    for key in {"contrast", "balance", "grad_norm", "experts"} & want[0].keys():
        np.testing.assert_allclose([e[key] for e in curves], [e[key] for e in want], rtol=1e-3, atol=1e-6)
    assert curves[0].keys() == want[0].keys() and "contrast" in curves[0]


def test_both_processes_have_the_same_model(two):
    a, b = (checkpoint.load(two / f"prefix_first-{rank}.safetensors")[0] for rank in (0, 1))
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def test_the_first_process_alone_writes(two):
    assert {p.name for p in (two / "stopped").iterdir()} == {"checkpoint.safetensors", "training.jsonl", "tensorboard"}
    assert len(list((two / "stopped" / "tensorboard").iterdir())) == 1
    assert not list(two.glob("**/.*.tmp"))


def test_a_signal_to_one_stops_all_at_the_same_step(two):
    """The second step of the second epoch of six."""
    stops = [json.loads((two / f"stopped-{rank}.json").read_text()) for rank in (0, 1)]
    assert stops[0] == stops[1] == {"calls": 8, "steps": 2}


def test_two_start_and_one_finishes(one, two, whole):
    fit = several.quick_fit(one, two / "stopped", World(), several.SETTINGS["prefix_first"])
    fit.run()
    assert_close(several.found(fit), whole("prefix_first"), rtol=1e-3, atol=1e-4)


def test_one_starts_and_two_finish(two, whole):
    for rank in (0, 1):
        assert_close(checkpoint.load(two / f"one-then-two-{rank}.safetensors")[0], whole("text_first"), rtol=1e-3,
                     atol=1e-4)


def test_item_texts_are_read_once_among_two(two):
    for rank in (0, 1):
        found = checkpoint.load(two / f"read-{rank}.safetensors")[0]
        assert found["read"].tolist() == [[3, 3], [3, 1]][rank]
        torch.testing.assert_close(found["together"], found["alone"])


def test_dropout_differs_and_nothing_else(two):
    a, b = (checkpoint.load(two / f"masks-{rank}.safetensors")[0] for rank in (0, 1))
    assert not torch.equal(a.pop("drawn")[0], b.pop("drawn")[0])
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize(("name", "settings"), several.SHARDS.items())
def test_a_sharded_llm_gives_the_same_model(llm_folder, two, tmp_path, name, settings):
    llm = load_backbone(BackboneConfig(name=str(llm_folder()), precision="fp32", engine="transformers", **settings))
    fit = several.quick_fit(llm, tmp_path, World(), several.SHARDED, users=5)
    fit.run()
    embedding = llm.embedding.numel()
    rest = sum(p.numel() for p in llm.decoder.parameters()) - embedding
    for rank in (0, 1):
        found = checkpoint.load(two / f"{name}-{rank}.safetensors")[0]
        assert int(found.pop("held")) - embedding <= rest // 2 + 64  # half, and what does not divide
        assert_close(found, several.found(fit), rtol=1e-3, atol=1e-4)


# -- the command line -------------------------------------------------------------------------------------------

def test_torchrun_fits_and_one_process_speaks(steps, tmp_path):
    out = tmp_path / "model"
    done = launch("-m", "laserrec", "fit", steps / "data", out, "--id-model", steps / "ids", "--config",
                  steps / "tiny.toml", "--device", "cpu", "--json", tmp_path / "fit.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall("validation NDCG@10", done.stdout)) == 1
    assert json.loads((tmp_path / "fit.json").read_text())["trained_parameters"] > 0
    assert not (out / "checkpoint.safetensors").exists()
    model = LaserRecommender.from_pretrained(out)
    assert model.recommend([["i1", "i2"]], k=3).height == 3


def test_two_fit_laser_and_its_id_models(steps, tmp_path):
    """Of two settings of the ID model both are tried, by both processes; the choice and the weights are one's."""
    done = launch("-m", "laserrec", "fit", steps / "data", tmp_path / "two", "--config", steps / "tiny.toml",
                  "--device", "cpu", "--quiet", "--backbone.precision", "fp32", "--blend.shuffles", "1",
                  "--id-model.max-epochs", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    settings = load_config("small", steps / "tiny.toml", {
        "backbone": {"precision": "fp32"}, "blend": {"shuffles": (1.0,)}, "id_model": {"max_epochs": 2}})
    one = LaserRecommender.fit_dataset(Dataset.load(steps / "data"), settings, tmp_path / "one", progress=False)
    two = LaserRecommender.from_pretrained(tmp_path / "two")
    assert one.config.id_model == two.config.id_model
    ids = [dict(model.model.ids.model.state_dict()) for model in (two, one)]
    assert_close(*ids, rtol=1e-3, atol=6e-3)  # Adam turns the rounding of a gradient of zero into whole steps
    assert not [*tmp_path.glob("*/id_model_trials")]


def test_what_fails_in_one_process_ends_all_with_one_message(two):
    """The second process was given another learning rate."""
    ends = [json.loads((two / f"failed-{rank}.json").read_text()) for rank in (0, 1)]
    assert [e["code"] for e in ends] == [2, 2]
    errors = [re.findall("error: .*|Traceback", e["said"]) for e in ends]
    assert errors[0] == [] and len(errors[1]) == 1
    assert "process 1 of 2 has other data, settings or another ID model" in errors[1][0]


@pytest.mark.parametrize(("rank", "voices"), [("0", 1), ("1", 0)])
def test_other_commands_refuse_several_processes(monkeypatch, capsys, rank, voices):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["laserrec", "pretrain", "data", "ids"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("only fit runs in several processes") == voices


def test_fitting_frames_refuses_several_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="fit runs in one process"):
        LaserRecommender.fit(*tiny.planted_tables(6, 5))
    assert not list(tmp_path.iterdir())


def test_processes_that_can_not_be_met(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="can't be met"):
        distributed.join()
    monkeypatch.delenv("WORLD_SIZE")
    assert distributed.join() == World()


def test_settings_that_shards_can_not_have():
    for over in ({"backbone": {"shard": True, "engine": "native"}}, {"backbone": {"shard": True}},
                 {"backbone": {"shard": True, "quantization": "int8"}, "prompt": {"layout": "prefix_first"}}):
        with pytest.raises(UserError, match="shard"):
            load_config("small", None, over)
    one_depth = {"backbone": {"shard": True, "mean_layers": ()}, "prompt": {"layout": "prefix_first"}}
    assert load_config("small", None, one_depth)
