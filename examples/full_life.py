"""A recommender's full life, on a small shop's own CSVs: prepare, pretrain, fit, serve, a new item over HTTP, a
restart, and recommendations for everybody.

    python examples/full_life.py                    # everything goes into runs/full-life; some minutes on two cores
    python examples/full_life.py --out elsewhere --config mine.toml     # other settings

Every step is a command that is printed before it runs, so that you can run it by hand on files of your own. It needs
`pip install 'laserrec[serve]'`. Run again it goes on from what is there; delete the folder to start over.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import random
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

HERE = Path(__file__).resolve().parent
DEPARTMENTS = {  # category -> its brands and its goods; people stay in one department, mostly
    "coffee": (("Arabia", "Crema"), ("espresso beans", "filter beans", "coffee grinder", "moka pot", "milk frother",
                                     "paper filters", "espresso cups", "descaler")),
    "cycling": (("Velo", "Pedal"), ("bicycle chain", "inner tube", "bicycle pump", "brake pads", "rear light",
                                    "water bottle", "chain oil", "tyre levers")),
    "painting": (("Pigment", "Canvas"), ("acrylic paint", "oil paint", "flat brush", "round brush", "easel",
                                         "palette knife", "varnish", "sketch paper")),
    "camping": (("Tundra", "Ridge"), ("two person tent", "sleeping bag", "camping stove", "gas cartridge", "head torch",
                                      "rope", "sleeping mat", "cool box")),
    "baking": (("Dough", "Ovenly"), ("bread tin", "rolling pin", "cake ring", "kitchen scale", "whisk",
                                     "baking paper", "proofing basket", "icing bag")),
    "gardening": (("Moss", "Fern"), ("secateurs", "hand trowel", "watering can", "seed tray", "plant pots",
                                     "garden hose", "compost", "tomato seeds")),
}
NEW = {"item_id": "COFFEE-NEW", "title": "espresso machine", "brand": "Crema", "category": "coffee"}
FITTING, OTHER = ["COFFEE-1", "COFFEE-3", "COFFEE-5", "COFFEE-8"], ["CYCLING-1", "CYCLING-3", "CYCLING-5"]
CUSTOMERS, ORDERS, SHOWN = 180, 8, 10
START_SECONDS = 300


def write_shop(folder: Path) -> None:
    """goods.csv and orders.csv, as a shop might export them; the same at every run."""
    folder.mkdir(parents=True, exist_ok=True)
    goods = [(f"{category.upper()}-{number}", name, brands[number % 2], category)
             for category, (brands, names) in DEPARTMENTS.items() for number, name in enumerate(names, 1)]
    rng, orders = random.Random(0), []
    for customer in range(1, CUSTOMERS + 1):
        home = sorted(DEPARTMENTS)[customer % len(DEPARTMENTS)]
        at_home = [sku for sku, *_, category in goods if category == home]
        basket = rng.sample(at_home, ORDERS - 2)
        basket.insert(rng.randrange(ORDERS - 1), rng.choice(goods)[0])  # now and then something else
        orders += [(f"customer-{customer:03}", sku, day) for day, sku in enumerate(dict.fromkeys(basket), 1)]
    for name, head, rows in (("goods.csv", ("sku", "name", "brand", "category"), goods),
                             ("orders.csv", ("customer", "sku", "day"), orders)):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *rows])


def laserrec(*arguments: object) -> None:
    """Run a command; a failure ends the example with the command's own message."""
    words = [str(a) for a in arguments]
    print("\n$ laserrec " + shlex.join(words), flush=True)
    if subprocess.run([sys.executable, "-m", "laserrec", *words]).returncode:
        sys.exit(f"laserrec {words[0]} failed")


@contextlib.contextmanager
def serving(model: Path, log: Path) -> Iterator[str]:
    """The server's address, once it is ready; whatever happens inside, the server is ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    print(f"\n$ laserrec serve {model} --port {port} &", flush=True)
    with open(log, "ab") as out:
        process = subprocess.Popen([sys.executable, "-m", "laserrec", "serve", str(model), "--port", str(port)],
                                   stdout=out, stderr=out)
    try:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + START_SECONDS
        while not ready(address):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit(f"the server did not start; {log} says:\n{log.read_text(errors='replace')}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()  # it finishes what it was asked, then ends
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def call(address: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET, or POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + route, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        sys.exit(f"{route} was answered {error.code}: {error.read().decode(errors='replace')}")


def recommend(address: str, history: list[str]) -> list[str]:
    """All item ids but the history's, best first; the first few are printed."""
    body = {"history": history, "k": 100, "exclude_seen": True}
    print(f"\nPOST /v1/recommend {json.dumps(body)}")
    items = call(address, "/v1/recommend", body)["items"]
    for item in items[:SHOWN]:
        print(f"  {item['rank']:2}  {item['score']:.3f}  {item['item_id']:12} {item['title']}")
    return [item["item_id"] for item in items]


def add_and_recommend(model: Path, out: Path) -> dict[str, Any]:
    """Add an item to the running server, see it recommended to those whom it fits, and that a restart forgets
    nothing."""
    with serving(model, out / "server.log") as address:
        there = {item["item_id"] for item in call(address, "/v1/items?query=espresso%20machine")["items"]}
        if NEW["item_id"] not in there:  # else this is not the first run
            print(f"\nPOST /v1/items {json.dumps(NEW)}")
            print("  " + json.dumps(call(address, "/v1/items", {"items": [NEW]})))
        fitting, other = recommend(address, FITTING), recommend(address, OTHER)
    with serving(model, out / "server.log") as address:
        again = recommend(address, FITTING)
    return {"recommended": fitting, "after_a_restart": again,
            "place_for_a_fitting_history": fitting.index(NEW["item_id"]) + 1,
            "place_for_another_history": other.index(NEW["item_id"]) + 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/full-life"), help="where everything goes")
    parser.add_argument("--config", type=Path, default=HERE / "full_life.toml", help="settings of all steps")
    chosen = parser.parse_args()
    out, settings = chosen.out, ("--config", chosen.config)

    write_shop(out)
    laserrec("prepare", out / "orders.csv", out / "data", "--items", out / "goods.csv", "--columns",
             "user_id=customer", "item_id=sku", "timestamp=day", "title=name", *settings)
    laserrec("pretrain", out / "data", out / "id_model", "--quiet", *settings)
    laserrec("fit", out / "data", out / "model", "--id-model", out / "id_model", "--quiet", *settings)
    laserrec("evaluate", out / "data", out / "model", "popularity", "--record", "--quiet")

    outcome = add_and_recommend(out / "model", out)

    orders = pl.read_csv(out / "orders.csv").sort("customer", "day")
    orders.select(user_id="customer", item_id="sku").write_parquet(out / "histories.parquet")
    laserrec("batch", out / "model", out / "histories.parquet", out / "recommendations", "--k", 5, "--exclude-seen",
             "--quiet")
    table = pl.read_parquet(out / "recommendations" / "part-*.parquet")
    print(table.head(5))
    (out / "outcome.json").write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")

    print(f"\nThe new item, which nobody has bought yet, is number {outcome['place_for_a_fitting_history']} for "
          f"somebody who buys coffee things and number {outcome['place_for_another_history']} for somebody who rides a "
          f"bicycle. All of it is in {out}.")


if __name__ == "__main__":
    main()
