"""`laserrec prepare`."""

import json
import re

from conftest import N, write_raw


def test_prepare_tells_what_it_made_and_dropped(run, settings, tmp_path):
    write_raw(tmp_path)
    with open(tmp_path / "orders.csv", "a", encoding="utf-8") as file:
        file.write("lonely,i1,0\n")
    arguments = ("prepare", tmp_path / "orders.csv", tmp_path / "data", "--items", tmp_path / "goods.csv",
                 "--columns", "user_id=customer", "item_id=sku", "--config", settings)
    code, out, err = run(*arguments, "--json", tmp_path / "report.json")
    assert code == 0, err
    facts = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert facts["table1"]["users"] == 12 and facts["table1"]["items"] == N
    assert re.search("dropped 1 interactions?", out) and "dropped 84" not in out
    code, out, err = run(*arguments)
    assert code == 0 and "the same data folder was there already" in out, err
