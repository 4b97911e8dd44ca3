"""`laserrec prepare`."""

import json

from shop import N, write_raw


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
    assert "Dropped 1 user, 1 interaction: k-core" in out and out.count("Dropped") == 1
    code, out, err = run(*arguments)
    assert code == 0 and "the same data folder was there already" in out, err


def test_prepare_reads_what_excel_writes_and_tells_losses_once(run, settings, tmp_path):
    write_raw(tmp_path)
    for name in ("orders", "goods"):
        text = (tmp_path / f"{name}.csv").read_text(encoding="utf-8").replace(",", ";").replace("i1;", "Bär;")
        (tmp_path / f"{name}.csv").write_text(text, encoding="cp1252")
    with open(tmp_path / "orders.csv", "a", encoding="cp1252") as file:
        file.writelines(f"u{n};unknown;{n}\n" for n in range(30))
    call = ("prepare", tmp_path / "orders.csv", tmp_path / "data", "--items", tmp_path / "goods.csv", "--columns",
            "user_id=customer", "item_id=sku", "--config", settings, "--separator", ";")
    assert "not UTF-8" in run(*call)[2]
    code, out, err = run(*call, "--encoding", "cp1252")
    assert code == 0 and "Dropped 18 users, 1 item, 30 interactions: item has no row" in out, (out, err)
    assert "Warning" not in err and "warning" not in err
