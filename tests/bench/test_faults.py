"""The measuring programs for faults and malformed input, for a few seconds, in a process of their own: they fork."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def script(name, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, ROOT / "benchmarks" / name, *map(str, arguments)], capture_output=True,
                         text=True, env=environment)
    assert run.returncode == 0, run.stderr


def test_a_kill_and_a_full_disk(tmp_path):
    script("faults.py", "--kills", 1, "--only", "fit popularity", "--only", "save_pretrained", "--out",
           tmp_path / "faults.json")
    rows = json.loads((tmp_path / "faults.json").read_text())
    assert len(rows) == 4 and [row for row in rows if row["survived"] < row["kills"]] == []


def test_malformed_input_is_refused_clearly(tmp_path):
    script("malformed.py", "--cases", 100, "--show", "--out", tmp_path / "malformed.json")
    counts = json.loads((tmp_path / "malformed.json").read_text())
    assert counts["tried"] == counts["clear"] == 100
    assert [counts[kind] for kind in ("traceback", "http_500", "hang", "crash")] == [0] * 4
