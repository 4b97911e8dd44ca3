"""`laserrec knowledge`, then a KAR of its texts."""

import json


def test_texts_are_written_and_fitted_with(run, settings, data, tmp_path):
    place = tmp_path / "texts"
    run("knowledge", data, place, "--items", 3, "--histories", 2, "--tokens", 4, "--config", settings, "--json",
        tmp_path / "k.json")
    told = json.loads((tmp_path / "k.json").read_text())
    assert told["items"] == 3 and told["histories"] == 2
    assert len((place / "items.jsonl").read_text().splitlines()) == 3
    run("fit", data, tmp_path / "m", "--method", "kar", "--kar.knowledge", place, "--config", settings)
    assert json.loads((tmp_path / "m" / "model.json").read_text())["config"]["kar"]["knowledge"] == str(place)
    assert "| `kar.knowledge` | texts |" in (tmp_path / "m" / "README.md").read_text()


def test_numbers_that_make_no_sense(run, data, tmp_path):
    code, _, err = run("knowledge", data, tmp_path / "texts", "--tokens", 0)
    assert code and "at least one token" in err and not (tmp_path / "texts").exists()
