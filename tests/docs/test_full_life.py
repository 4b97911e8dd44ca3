"""The example of a full life, run as a person runs it, in its own process, with a tiny LLM and few epochs."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import polars as pl
import pytest
import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 540
SETTINGS = """
[id_model]
d_id = 32
max_epochs = 40
[backbone]
name = "{llm}"
precision = "fp32"
layers = 3
mean_layers = [2, 3]
[prompt]
max_item_tokens = 64  # its tokens are letters
[head]
whiten_dims = 16
[train]
batch_size = 32
stage_one_epochs = 1
stage_two_epochs = 0
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    llm = tiny.save_llm(folder / "llm", "llama", hidden_size=64, intermediate_size=96)
    (folder / "tiny.toml").write_text(SETTINGS.replace("{llm}", str(llm)))
    return folder / "tiny.toml"


def run(*arguments: object) -> tuple[int, str]:
    """(exit code, what it printed). On a timeout the example and the server that it started are killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    process = subprocess.Popen([sys.executable, EXAMPLES / "full_life.py", *map(str, arguments)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
                               start_new_session=True)
    try:
        said = process.communicate(timeout=SECONDS)[0]
        return process.returncode, said
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


@pytest.fixture(scope="module")
def life(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("life") / "out"
    code, said = run("--out", out, "--config", settings)
    assert code == 0, said
    return out, said, json.loads((out / "outcome.json").read_text())


def test_a_new_item_is_recommended_where_it_fits(life):
    _, said, outcome = life
    assert outcome["recommended"].index("COFFEE-NEW") < 10
    assert outcome["place_for_a_fitting_history"] < outcome["place_for_another_history"]
    assert len(outcome["recommended"]) == 49 - 4 and "COFFEE-1" not in outcome["recommended"]
    assert '"changed": 1' in said and f"number {outcome['place_for_a_fitting_history']} for somebody" in said


def test_a_restart_forgets_nothing(life):
    out, _, outcome = life
    assert outcome["after_a_restart"] == outcome["recommended"]
    assert pl.read_parquet(out / "model" / "served" / "items.parquet")["item_id"].to_list() == ["COFFEE-NEW"]


def test_everybody_gets_recommendations_once(life):
    out, *_ = life
    table = pl.concat([pl.read_parquet(f) for f in sorted((out / "recommendations").glob("part-*.parquet"))])
    customers = pl.read_csv(out / "orders.csv")["customer"].unique()
    runs = table["user_id"].rle().struct.field("value")
    assert sorted(runs) == sorted(customers)  # one run of rows each
    assert table.group_by("user_id").len()["len"].to_list() == [5] * len(customers)
    assert table["rank"].to_list() == [1, 2, 3, 4, 5] * len(customers)
    bought = pl.read_csv(out / "orders.csv").select(user_id="customer", item_id="sku")
    assert table.join(bought, on=["user_id", "item_id"]).is_empty()


def test_no_server_is_left(life):
    _, said, _ = life
    ports = re.findall(r"laserrec serve .* --port (\d+)", said)
    assert len(ports) == 2
    for port in ports:
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5)


def test_a_failing_step_ends_it_with_the_steps_own_message(tmp_path):
    (tmp_path / "bad.toml").write_text("[train]\nnonsense = 1\n")
    code, said = run("--out", tmp_path / "out", "--config", tmp_path / "bad.toml")
    assert code == 1 and "train.nonsense" in said and "laserrec prepare failed" in said and "Traceback" not in said
