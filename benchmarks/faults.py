"""Every command that writes, under kill -9 and on a full disk.

Each is killed at random moments spread over its own duration. After a kill, what it writes must be absent, unfinished
(and refused with a clear message) or whole and right; where it replaces something, the old must still be there. The
same command again must end with the result of an uninterrupted run. On a full disk (a small tmpfs where mounting is
allowed, else a limit on the size of files) it must end with one line and leave nothing half-written.

  python benchmarks/faults.py --kills 50            # benchmarks/results/faults.json; run again to go on
  python benchmarks/faults.py --kills 5 --only batch
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import forked
from forked import command, ended, one_clear_line

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "cli")]

RESULTS = Path(__file__).parent / "results" / "faults.json"
_MODEL_FILES = ("weights.safetensors", "items.parquet", "items.safetensors", "id_model/weights.safetensors")


@dataclass
class Case:
    """A command: how it is given for a place, what must be there before, how its result is opened and told apart."""

    arguments: Callable[[Path], list[object]]
    check: Callable[[Path], None]
    """Opens the result in a child; raises UserError where it is unfinished, anything else is a fault."""
    digest: Callable[[Path], str]
    before: Path | None = None
    """Copied to the place first; then the place must never be refused."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--only", action="append", help="a command's name; may be given several times")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    forked.warm()
    with tempfile.TemporaryDirectory(prefix="laserrec-faults-") as folder:
        measure(Path(folder), given.kills, given.only, given.out)


def measure(folder: Path, kills: int, only: list[str] | None, out: Path) -> list[dict]:
    """Rows of {what, kills, survived}; each is kept in `out` once it is there, and not measured again."""
    from served_kills import served_rows

    cases = prepared(folder)
    known = {*cases, "served changes"}
    if only and (wrong := sorted({*only} - known)):
        raise SystemExit(f"no such command: {', '.join(wrong)}; there are {', '.join(sorted(known))}")
    for name in cases:
        if not only or name in only:
            for what, work in ((name, killed), (f"{name}, full disk", full_disk)):
                if not _has(out, what, kills):
                    _keep(out, work(what, cases[name], folder / "work", kills))
    if (not only or "served changes" in only) and not _has(out, "served changes", kills):
        for row in served_rows(folder / "laser", folder / "served", kills):
            _keep(out, row)
    return _rows(out)


def _rows(out: Path) -> list[dict]:
    return json.loads(out.read_text("utf-8")) if out.exists() else []


def _has(out: Path, what: str, kills: int) -> bool:
    return any(row["what"] == what and (row["kills"] >= kills or "full disk" in what) for row in _rows(out))


def _keep(out: Path, row: dict) -> None:
    print(json.dumps(row), flush=True)
    rows = [other for other in _rows(out) if other["what"] != row["what"]] + [row]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(sorted(rows, key=lambda r: r["what"]), indent=2) + "\n", "utf-8")


# -- commands -------------------------------------------------------------------------------------------------------


def prepared(folder: Path) -> dict[str, Case]:
    """Inputs of a few users and neurons, and the commands that read them."""
    data, settings, model, sasrec = folder / "data", folder / "tiny.toml", folder / "laser", folder / "sasrec"
    raw = [folder / "orders.csv", "--items", folder / "goods.csv", "--columns", "user_id=customer", "item_id=sku",
           "--config", settings]
    fit = ["--config", settings, "--quiet", "--device", "cpu"]
    _child(lambda: _inputs(folder, settings), folder)
    _child(command("prepare", raw[0], data, *raw[1:]), folder)
    _child(command("fit", data, sasrec, "--method", "sasrec", *fit), folder)
    _child(command("fit", data, model, *fit), folder)
    _child(command("index", "build", model, folder / "index", "--queries", 5), folder)

    def fitted(method: str) -> Case:
        return Case(lambda out: ["fit", data, out, "--method", method, *fit], _open_model, _model_digest)

    distil = ["--hidden", 8, "--epochs", 2, "--quiet", "--device", "cpu"]
    return {
        "prepare": Case(lambda out: ["prepare", raw[0], out, *raw[1:]], _open_data, _folder_digest),
        "prepare again": Case(lambda out: ["prepare", raw[0], out, *raw[1:], "--overwrite"], _open_data,
                              _folder_digest, data),
        **{f"fit {name}": fitted(name) for name in ("laser", "sasrec", "bert4rec", "ease", "ease-text",
                                                    "nearest-text", "popularity")},
        "pretrain": Case(lambda out: ["pretrain", data, out, *fit], _open_model, _model_digest),
        "distil": Case(lambda out: ["distil", data, model, out, *distil], _open_model, _model_digest),
        "index build": Case(lambda out: ["index", "build", model, out, "--queries", 5], _open_index, _index_digest),
        "index build again": Case(lambda out: ["index", "build", model, out, "--queries", 5], _open_index,
                                  _index_digest, folder / "index"),
        "batch": Case(lambda out: ["batch", sasrec, folder / "histories.csv", out, "--chunk", 3], _open_batch,
                      _batch_digest),
        "save_pretrained": Case(lambda out: [sasrec], _open_model, _model_digest, sasrec),
        "report": Case(lambda out: ["report", model, "--data", data, "--out", out / "report.html"], _open_page,
                       _page_digest),
    }


def _inputs(folder: Path, settings: Path) -> None:
    import shop
    import tiny

    tiny.save_llm(folder / "llm", "llama")
    settings.write_text(shop.TINY.replace("{folder}", str(folder / "llm")), "utf-8")
    shop.write_raw(folder)
    orders = (folder / "orders.csv").read_text("utf-8").splitlines()
    (folder / "histories.csv").write_text("\n".join(["user_id,item_id,timestamp", *orders[1:]]) + "\n", "utf-8")


def _child(work: Callable[[], None], folder: Path) -> None:
    run = ended(work, folder / "errors")
    if run.code != 0:
        raise SystemExit(f"the preparation failed: {run.error}")


def _work(case: Case, out: Path) -> Callable[[], None]:
    arguments = case.arguments(out)
    if arguments[0] != case.before:
        return command(*arguments)

    def save() -> None:
        from laserrec import LaserRecommender

        LaserRecommender.from_pretrained(arguments[0], device="cpu").save_pretrained(out)

    return save


# -- looking --------------------------------------------------------------------------------------------------------


def _open_data(out: Path) -> None:
    from laserrec.data.dataset import Dataset

    Dataset.load(out)


def _open_model(out: Path) -> None:
    from laserrec import LaserRecommender

    LaserRecommender.from_pretrained(out, device="cpu")


def _open_index(out: Path) -> None:
    from laserrec.retrieval.folder import load_index

    load_index(out)


def _open_batch(out: Path) -> None:
    import polars as pl

    for file in out.glob("part-*.parquet"):
        pl.read_parquet(file)


def _open_page(out: Path) -> None:
    from laserrec.util.errors import UserError

    if not (out / "report.html").exists():
        raise UserError("no page")
    if not (out / "report.html").read_text("utf-8").rstrip().endswith("</html>"):
        raise ValueError("half a page")


def _sha(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + (file.read_bytes() if file.exists() else b"none"))
    return digest.hexdigest()


def _model_digest(out: Path) -> str:
    return _sha(*(out / name for name in _MODEL_FILES)) + ("" if not list(out.glob("checkpoint*")) else " checkpoint")


def _folder_digest(out: Path) -> str:
    return _sha(*sorted(out.glob("*.parquet")))


def _index_digest(out: Path) -> str:
    facts = json.loads((out / "index.json").read_text("utf-8"))
    return str((facts["catalogue"], facts["items"], facts["kind"]))


def _batch_digest(out: Path) -> str:
    return _sha(*sorted(out.glob("part-*.parquet")))


def _page_digest(out: Path) -> str:
    return str(len((out / "report.html").read_text("utf-8")) // 2000)  # times of training are in it


# -- faults ---------------------------------------------------------------------------------------------------------


def _fresh(case: Case, work: Path) -> Path:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if case.before is not None:
        shutil.copytree(case.before, work / "out")
    return work / "out"


def _whole(case: Case, out: Path, errors: Path, wanted: str) -> str | None:
    """What is wrong with what a fault left, or None."""
    def look() -> None:
        from laserrec.util.errors import UserError

        try:
            case.check(out)
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(3)

    run = ended(look, errors)
    if run.code == 3 and case.before is None:
        return None
    if run.code != 0:
        return f"refused after a fault: {run.error[-300:]}"
    parts = case.check is _open_batch  # batch is finished part by part
    return None if parts or case.digest(out) in (wanted, wanted + " checkpoint") else "another result after a fault"


def killed(what: str, case: Case, work: Path, kills: int) -> dict:
    """Kill at moments spread evenly, each within its share at random; look; run again to the end; compare."""
    errors = work.with_name("errors")
    out = _fresh(case, work)
    first = ended(_work(case, out), errors)
    if first.code != 0:
        raise SystemExit(f"{what} fails by itself: {first.error}")
    wanted, draw, faults = case.digest(out), random.Random(what), []
    for number in range(kills):
        out = _fresh(case, work)
        ended(_work(case, out), errors, first.seconds * (number + draw.random()) / kills)
        wrong = _whole(case, out, errors, wanted)
        again = ended(_work(case, out), errors)
        if wrong is None and again.code != 0:
            wrong = f"can't be run again: {again.error[-300:]}"
        if wrong is None and case.digest(out) != wanted:
            wrong = "another result after running again"
        if wrong is not None:
            faults.append(wrong)
    row = {"what": what, "kills": kills, "survived": kills - len(faults), "seconds": round(first.seconds, 2)}
    return row | ({"faults": sorted(set(faults))[:3]} if faults else {})


def full_disk(what: str, case: Case, work: Path, kills: int) -> dict:
    """Disks of several sizes below what the result needs."""
    errors = work.with_name("errors")
    out = _fresh(case, work)
    ended(_work(case, out), errors)
    size, wanted, faults, tried = _kib(work), case.digest(out), [], 0
    for share in (0.05, 0.3, 0.6, 0.9)[:max(1, kills)]:
        kib = max(4, int(size * share)) + (_kib(case.before) if case.before else 0)
        mounted = _mount(work, kib)
        out = work / "out"
        if case.before is not None:
            shutil.copytree(case.before, out)
        try:
            run = ended(_work(case, out), errors, file_bytes=None if mounted else int(size * share * 256))
            tried += 1
            ok = run.code == 0 or one_clear_line(run) or (case.arguments(out)[0] == case.before
                                                          and run.error.rstrip().splitlines()[-1].startswith(
                                                              "laserrec.util.errors.UserError"))
            wrong = None if ok else f"exit {run.code}: {run.error[-300:]}"
            wrong = wrong or _whole(case, out, errors, wanted)
        finally:
            if mounted:
                subprocess.run(["umount", work], check=True)
        if wrong is not None:
            faults.append(wrong)
    row = {"what": what, "kills": tried, "survived": tried - len(faults), "disk": "tmpfs" if mounted else "file limit"}
    return row | ({"faults": sorted(set(faults))[:3]} if faults else {})


def _kib(folder: Path) -> int:
    return sum(4 * -(-file.stat().st_size // 4096) for file in folder.rglob("*") if file.is_file())


def _mount(work: Path, kib: int) -> bool:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", work],
                              capture_output=True).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    main()
