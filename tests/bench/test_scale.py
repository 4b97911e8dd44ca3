"""The measuring program for large data, on small data."""

import json
import subprocess
import sys
from pathlib import Path

import scale

SCRIPT = Path(scale.__file__)


def test_measurements_are_added_and_not_repeated(tmp_path):
    out = tmp_path / "scale.json"
    out.write_text(json.dumps([{"part": "prepare", "items": 50, "interactions": 2000, "seconds": 7.0}]))
    command = [sys.executable, SCRIPT, "prepare", "sasrec, sampled", "--items", "50", "--interactions", "2000",
               "--contended", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(out.read_text())
    assert first["seconds"] == 7.0
    assert (second["part"], second["softmax"], second["contended"]) == ("sasrec, sampled", "sampled", True)
    assert second["peak_gib"] > 0.1 and second["ndcg@10"] > 0


def test_partners_are_planted():
    rows = scale.planted(1000, 20_000)
    assert rows.shape == (2000, scale.LENGTH)
    same = rows[:, 1:] // scale.GROUP == rows[:, :-1] // scale.GROUP
    assert 0.55 < same.mean() < 0.7
    assert scale.measured("prepare", 50, 2000)["kept"] > 1900
