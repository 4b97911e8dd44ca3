"""Malformed input with fixed seeds: over HTTP, in files, settings and flags, and in every folder that is opened.

Each case must be refused in one clear line (a UserError, or a 4xx with a short detail) or be answered rightly. Cases
run in worker processes forked from this one; one that dies (crash) or does not end (hang) is counted, and the next
goes on.

  python benchmarks/malformed.py --cases 10000       # benchmarks/results/malformed.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import forked
from forked import ended

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "cli"),
                str(Path(__file__).parents[1] / "tests" / "server")]

RESULTS = Path(__file__).parent / "results" / "malformed.json"
KINDS = ("clear", "traceback", "http_500", "hang", "crash")
_SECONDS = 20
"""Of one case, until it hangs."""
_ODD = ("NaN", "-Infinity", "1e999", "1" * 5_000, "-1", "0", "18446744073709551616", "1e10", '""', "null", "true",
        "[]", "{}", '"\\ud800"', '"\\u0000"', '"../../x"', "[" * 5_000, '{"a":' * 3_000, '"%s"' % ("x" * 70_000),
        "0.5", '"x"', "[[1]]", "2147483648", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print each fault")
    given = parser.parse_args()
    forked.warm()
    with tempfile.TemporaryDirectory(prefix="laserrec-malformed-") as folder:
        counts, faults = measure(Path(folder), given.cases)
    for place, fault in faults if given.show else ():
        print(f"{place}: {fault}", file=sys.stderr)
    print(json.dumps(counts, indent=2))
    given.out.write_text(json.dumps(counts, indent=2) + "\n", "utf-8")


def measure(folder: Path, cases: int) -> tuple[dict, list[tuple[str, str]]]:
    """Counts as in the result file, and (case, what happened) of all that is not clear."""
    from faults import prepared

    prepared(folder)
    counts, faults, log = Counter(tried=0), [], folder / "outcomes"
    for door, share in SHARES.items():
        number, last = 0, max(1, round(cases * share))
        while number < last:  # a worker that died is followed by one that begins behind the case it died of
            log.unlink(missing_ok=True)
            begin = number
            run = ended(lambda door=door, begin=begin, last=last: _worker(door, begin, last, folder, log),
                        folder / "errors", limit_seconds=7_200)
            lines = log.read_text("utf-8").splitlines() if log.exists() else []
            for line in lines:
                kind, _, text = line.partition("\t")
                counts[kind] += 1
                faults += [(f"{door} {number}", f"{kind} {text}")] if kind != "clear" else []
                number += 1
            if number < last and run.code != 0:
                kind = "hang" if run.code == -signal.SIGALRM else "crash"
                counts[kind] += 1
                faults.append((f"{door} {number}", f"{kind} {run.code} {run.error[-300:]}"))
                number += 1
        counts["tried"] += last
        counts[f"by_door {door}"] = last
    doors = {door: counts[f"by_door {door}"] for door in SHARES}
    return {"tried": counts["tried"], **{kind: counts[kind] for kind in KINDS}, "doors": doors}, faults


def _worker(door: str, begin: int, last: int, folder: Path, log: Path) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, whatever it hangs in
    make, place = DOORS[door], folder / "case"
    context = make(folder)
    with log.open("a", encoding="utf-8") as file:
        for number in range(begin, last):
            signal.alarm(_SECONDS)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            outcome = _outcome(context, random.Random(f"{door} {number}"), place)
            signal.alarm(0)
            file.write(outcome.replace("\n", " | ") + "\n")
            file.flush()


def _outcome(case: Callable[[random.Random, Path], str | None], draw: random.Random, place: Path) -> str:
    from laserrec.util.errors import UserError

    try:
        return case(draw, place) or "clear"
    except UserError as error:
        text = str(error)
        return "clear" if len(text) < 3_000 else f"traceback\tmessage of {len(text)} letters: {text[:150]}"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "/laserrec/" in f.filename]
        return f"traceback\t{type(error).__name__} {own[-2:]} {str(error)[:200]}"


# -- damage ---------------------------------------------------------------------------------------------------------


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Flipped, cut, doubled, replaced or odd bytes."""
    kind = draw.randrange(7)
    at = draw.randrange(len(data)) if data else 0
    if kind == 0:
        for _ in range(draw.choice((1, 1, 8, 100))):
            at = draw.randrange(max(1, len(data)))
            data = data[:at] + bytes([(data[at] if data else 0) ^ 1 << draw.randrange(8)]) + data[at + 1:]
        return data
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + draw.randbytes(draw.choice((1, 8, 1000))) + data[at:]
    if kind == 3:
        return draw.choice((b"", b"\0" * 100, b"\xff\xfe", b"PAR1", b"PK\3\4", b"{}", b"[]", draw.randbytes(500)))
    if kind == 4:
        return data[:at] + draw.choice(_ODD).encode() + data[at:]
    if kind == 5:
        return data[at:] + data[:at]
    return data + data


def odd_json(text: str, draw: random.Random) -> str:
    """One value replaced, dropped or added."""
    tree = json.loads(text)
    node, keys = tree, []
    while isinstance(node, dict | list) and node and (not keys or draw.random() < 0.7):
        keys.append((node, draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))))
        node = keys[-1][0][keys[-1][1]]
    holder, key = keys[-1]
    if draw.random() < 0.15:
        del holder[key]
        return json.dumps(tree)
    holder[key] = "@@odd@@"
    if draw.random() < 0.1 and isinstance(holder, dict):
        holder["extra" + "x" * draw.choice((0, 1, 9_000))] = 1
    return json.dumps(tree).replace('"@@odd@@"', draw.choice(_ODD))


def spoil(folder: Path, draw: random.Random) -> None:
    """One file of a folder: damaged, missing, a link, a folder, or another file's content."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and "tensorboard" not in f.parts)
    file, kind = draw.choice(files), draw.randrange(10)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.unlink()
        file.symlink_to(draw.choice(("/etc/hostname", "/dev/zero", "/nowhere", file)))
    elif kind == 2:
        file.unlink()
        file.mkdir()
    elif kind == 3:
        file.write_bytes(draw.choice(files).read_bytes())
    elif file.suffix == ".json" and kind < 8:
        file.write_text(odd_json(file.read_text("utf-8"), draw), "utf-8", errors="surrogatepass")
    else:
        file.write_bytes(damaged(file.read_bytes(), draw))


# -- doors ----------------------------------------------------------------------------------------------------------


def _model(folder: Path):
    from laserrec import LaserRecommender

    def case(draw: random.Random, place: Path) -> None:
        source = folder / draw.choice(("sasrec", "laser"))
        shutil.copytree(source, place / "m")
        spoil(place / "m", draw)
        model = LaserRecommender.from_pretrained(place / "m", device="cpu")
        if source.name == "sasrec":
            model.recommend([["i1", "i2"]], k=3)

    return case


def _data(folder: Path):
    from laserrec.data.dataset import Dataset

    def case(draw: random.Random, place: Path) -> None:
        shutil.copytree(folder / "data", place / "d", ignore=shutil.ignore_patterns("text_features"))
        spoil(place / "d", draw)
        data = Dataset.load(place / "d")
        data.train_sequences, data.cases("test")

    return case


def _index(folder: Path):
    import numpy as np

    from laserrec.retrieval.folder import load_index

    def case(draw: random.Random, place: Path) -> None:
        shutil.copytree(folder / "index", place / "i")
        spoil(place / "i", draw)
        index = load_index(place / "i", shared=draw.random() < 0.5)
        index.search(np.ones((1, index.d), np.float32) / index.d**0.5, 3)

    return case


def _state(folder: Path):
    import numpy as np

    from laserrec.server.listing import Item
    from laserrec.server.state import Kept, State

    def case(draw: random.Random, place: Path) -> str | None:
        item = Item(item_id="n", title="saw", brand=None, category="a")
        kept = Kept(("i1",), {"n": item}, {"n": np.ones(8, np.float32)})
        state = State(place, "model")
        state.write(kept)
        spoil(place, draw)
        found = state.read()
        same = found.removed == kept.removed and found.added == kept.added and all(
            np.array_equal(found.embeddings.get(name), kept.embeddings[name]) for name in kept.embeddings)
        return None if same or not state.file.exists() else f"traceback\tanother state was read: {found}"[:300]

    return case


def _files(folder: Path):
    import datetime

    import polars as pl

    from laserrec.config import load_config
    from laserrec.data.prepare import prepare_source

    config = load_config("small", folder / "tiny.toml").data
    odd = [b"\xff", datetime.timedelta(1), [1], {"a": 1}, datetime.datetime(9999, 1, 1), 1e308, float("nan"), 2**63 - 1,
           True, None, datetime.date(1, 1, 1), "", "\0", " ", "9" * 400]

    def case(draw: random.Random, place: Path) -> None:
        kind = draw.choice(("csv", "jsonl", "parquet"))
        names = {}
        spoilt = draw.choice(("orders", "goods"))
        for name in ("orders", "goods"):
            frame = pl.read_csv(folder / f"{name}.csv")
            if name == spoilt and draw.random() < 0.4 and kind != "csv":
                column = draw.choice(frame.columns)
                frame = frame.with_columns(pl.Series(column, [draw.choice(odd)] * frame.height))
            names[name] = file = place / f"{name}.{kind}"
            writable = kind == "parquet" or not any(t in (pl.Binary, pl.Duration) for t in frame.dtypes)
            if not writable:
                frame = frame.with_columns(pl.all().map_elements(repr, return_dtype=pl.String))
            {"csv": frame.write_csv, "jsonl": frame.write_ndjson, "parquet": frame.write_parquet}[kind](file)
            if name == spoilt and draw.random() < 0.7:
                file.write_bytes(damaged(file.read_bytes(), draw))
        prepare_source([str(names["orders"]), str(names["goods"])], place / "data", config,
                       columns={"user_id": "customer", "item_id": "sku"})

    return case


def _toml(folder: Path):
    from laserrec.config import load_config

    text = (folder / "tiny.toml").read_text("utf-8")

    def case(draw: random.Random, place: Path) -> None:
        file = place / "x.toml"
        if draw.random() < 0.5:
            lines = text.splitlines()
            at = draw.choice([j for j, line in enumerate(lines) if "=" in line])
            lines[at] = lines[at].split("=")[0] + "= " + draw.choice((*_ODD, "inf", "nan", "1979-05-27", "{a = 1}"))
            file.write_text("\n".join(lines), "utf-8")
        else:
            file.write_bytes(damaged(text.encode(), draw))
        load_config("small", file)

    return case


def _flags(folder: Path):
    from laserrec.cli import main as cli

    commands = (("prepare", folder / "orders.csv", "OUT", "--items", folder / "goods.csv", "--columns",
                 "user_id=customer", "item_id=sku"),
                ("fit", folder / "data", "OUT", "--method", "popularity", "--quiet"),
                ("recommend", folder / "sasrec", "--history", "i1,i2", "--k", "3"),
                ("batch", folder / "sasrec", folder / "histories.csv", "OUT", "--k", "3", "--chunk", "4"),
                ("serve", folder / "nowhere", "--port", "0", "--max-batch", "4", "--timeout", "3"),
                ("index", "build", folder / "nowhere", "OUT", "--kind", "exact"),
                ("evaluate", folder / "data", folder / "sasrec", "--split", "test"))
    values = ("", "-1", "0", "nan", "inf", "9" * 500, "x" * 5_000, "/dev/null", "/proc/self/mem", "\udcff", "a=b=c",
              "=", ",", ",,", "1e999", "--", "-", "--help", "--k", "--device", "cuda:99", ".", "/", "None", "true")

    def case(draw: random.Random, place: Path) -> str | None:
        words = [str(place / "out") if w == "OUT" else str(w) for w in draw.choice(commands)]
        at, kind = draw.randrange(1, len(words)), draw.randrange(4)
        if kind == 0:
            del words[at]
        elif kind == 1:
            words.insert(at, draw.choice(values))
        else:
            words[at] = draw.choice(values)
        errors, sys.argv, code = place / "stderr", ["laserrec", *words], 0
        os.chdir(place)
        with errors.open("w", encoding="utf-8", errors="replace") as sys.stderr:
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code or 0
        sys.stderr = sys.__stderr__
        text = errors.read_text("utf-8")
        clear = code in (0, 2) and "Traceback" not in text and "unexpected" not in text
        return None if clear else f"traceback\t{words} exit {code}: {text[-250:]}"

    return case


def _http(folder: Path):
    from pathlib import Path as Folder

    from serving import Client

    from laserrec.server.service import Service
    from laserrec.server.settings import Limits

    state = Folder(tempfile.mkdtemp(dir=folder))
    opened = Service.opened(folder / "laser", state, Limits(), device="cpu")
    client = Client(opened.__enter__())
    client.opened = opened  # collected, it would close the service
    bodies = {"/v1/recommend": {"history": ["i1", "i2"], "k": 3, "exclude_seen": True, "candidates": ["i3"],
                                "exclude": ["i4"], "explain": True},
              "/v1/items": {"items": [{"item_id": "n", "title": "saw", "brand": "b", "category": "c"}]}}
    paths = ("/v1/items/%s", "/v1/items/%s/similar", "/v1/changes/%s", "/v1/items?query=%s", "/v1/items?limit=%s",
             "/v1/items?offset=%s", "/v1/items/i1/similar?k=%s", "/%s", "/v1/%s")
    parts = ("%00", "%ff", "..%2f..", "-1", "9" * 400, "NaN", "x" * 5_000, "%F0%9F%98%80", "i1", "%ed%a0%80", "", "%")

    def case(draw: random.Random, place: Path) -> str | None:
        if draw.random() < 0.75:
            path = draw.choice(list(bodies))
            text = json.dumps(bodies[path])
            body = odd_json(text, draw).encode("utf-8", "surrogatepass")
            if draw.random() < 0.3:
                body = damaged(text.encode(), draw)
            kind = draw.choice(("application/json",) * 9 + ("text/plain", "", "application/xml"))
            answer = client("POST", path, content=body, headers={"Content-Type": kind})
        else:
            path = draw.choice(paths).replace("%s", draw.choice(parts))
            answer = client(draw.choice(("GET", "GET", "DELETE", "PUT", "HEAD")), path)
        if answer.status_code >= 500:
            return f"http_500\t{path} {answer.status_code} {answer.text[:200]}"
        if answer.status_code >= 400 and len(answer.content) > 8_000:
            return f"traceback\t{path}: an answer of {len(answer.content)} bytes"
        return None

    return case


DOORS = {"http": _http, "files": _files, "toml": _toml, "flags": _flags, "model folder": _model,
         "index folder": _index, "data folder": _data, "state folder": _state}
SHARES = {"http": 0.3, "files": 0.15, "toml": 0.1, "flags": 0.05, "model folder": 0.1, "index folder": 0.1,
          "data folder": 0.1, "state folder": 0.1}

if __name__ == "__main__":
    main()
