"""The page: each section, nothing of a title becomes markup, nothing is fetched, and it stands in a real Chromium."""

import dataclasses
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from evil import EVIL, EVIL_BRAND, EVIL_CATEGORY, LIKE_DRAWING

from laserrec import LaserRecommender
from laserrec.config import StudentConfig
from laserrec.data.dataset import Dataset
from laserrec.recommender.distil import distil
from laserrec.report.charts import Mark, Series, line_chart, number, scatter
from laserrec.report.collect import collect
from laserrec.report.curves import Training, charts, thinned, validation_charts
from laserrec.report.page import render
from laserrec.report.places import find
from laserrec.report.results import Results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
needs_browser = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("LASERREC_REQUIRE_BROWSER"),
                                   reason="no chromium on this machine (Debian: apt install chromium)")
SECTIONS = ["summary", "results", "training", "experts", "map", "examples", "losses", "settings"]


@pytest.fixture(scope="module")
def report(run_folder):
    return collect(find(run_folder))


@pytest.fixture(scope="module")
def html(report):
    return render(report)


class Page(HTMLParser):
    """Tags with their attributes, all text, and whether every tag is closed in its order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.open, self.faults = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in ("meta", "link", "input", "br", "hr"):
            self.open.append(name)

    def handle_endtag(self, name):
        if not self.open or self.open.pop() != name:
            self.faults.append((name, self.getpos()))

    def handle_data(self, text):
        self.texts.append(text)


def test_it_parses_and_has_every_section(html):
    page = Page(html)
    assert page.faults == [] and page.open == []
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and [i for i in ids if i in SECTIONS] == SECTIONS
    used = {a["href"] for n, a in page.tags if n in ("a", "use")}
    used |= {f"#{name}" for name in re.findall(r"url\(#(\w+)\)", html)}
    assert used <= {f"#{i}" for i in ids}
    assert all(a.get("aria-label") for n, a in page.tags if n == "svg" and a.get("role") == "img")
    assert all("role" in a for n, a in page.tags if n == "svg")
    for text in ("Contrast loss", "Load-balancing loss", "Learning rate", "Gradient norm", "kept",
                 "Validation", "Offset of items seen before", "Experts while training", "Users by expert", "stage 2"):
        assert text in page.texts, text


def test_no_text_becomes_markup(html, report):
    page = Page(html)
    assert {n for n, _ in page.tags}.isdisjoint({"script", "img", "b", "i", "u"})
    assert sum(n == "style" for n, _ in page.tags) == 1
    assert not any(key.startswith("on") for _, a in page.tags for key in a)
    for text in (EVIL, EVIL_BRAND, EVIL_CATEGORY, "<i>SASRec"):
        assert text in [t.strip() for t in page.texts], text  # it is there, as text
    shown = [t for t in page.texts if t == EVIL]
    assert len(shown) >= sum(t == EVIL for t in report.items.titles) + 5  # on the map and in the examples


def test_nothing_is_fetched(html):
    page = Page(html)
    assert not any(key in a for _, a in page.tags for key in ("src", "srcset", "action", "poster"))
    assert {a["href"] for n, a in page.tags if n == "link"} == {"data:,"}
    style = html[html.index("<style>") : html.index("</style>")]
    assert set(re.findall(r"url\((.)", html)) <= {"#"} and "url(" not in style and "@import" not in style
    policy = next(a["content"] for n, a in page.tags if n == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "://" not in re.sub(r"xmlns=\S+", "", html)


def test_it_is_the_same_every_time(run_folder, html):
    assert render(collect(find(run_folder))) == html


def test_colours_are_variables(html):
    """A colour of a chart that is no variable would be the same in light and dark."""
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--c1)" in drawings and not re.search(r"(fill|stroke): #", drawings)
    used, style = set(re.findall(r"var\((--\w+)\)", html)), html[: html.index("</style>")]
    assert all(style.count(f"{name}:") == 2 for name in used - {"--even"})  # in light and in dark


# -- charts -----------------------------------------------------------------------------------------------------------


def test_numbers():
    assert [number(x) for x in (0, 1234.5, 0.12345, 2e-6, float("nan"))] == ["0", "1,234", "0.1235", "2.0e-06", "–"]


def test_a_line_has_gaps_marks_and_its_words():
    nan = float("nan")
    chart = line_chart("T", [Series("a", [0, 1, 2, 3], [1, nan, 3, 2]), Series("b", [0], [2])], "step", "loss",
                       [Mark(2, "kept")]).svg
    path = re.search(r'<g class="s0"[^>]*><path d="([^"]*)"', chart)[1]
    assert path.count("M") == 2 and path.count("L") == 1
    assert "a goes from 1 to 2, lowest 1, highest 3." in chart and "kept at 2." in chart
    page = Page(chart)
    assert page.faults == [] and {"kept", "loss", "step", "a", "b", "a 3"} <= set(page.texts)
    assert "no numbers" in line_chart("T", [Series("", [0], [nan])], "x", "y").svg
    assert "NaN" not in line_chart("T", [Series("", [1, 1], [5, 5])], "x", "y").svg


@pytest.mark.parametrize("name", [EVIL, "$x$ $", "日本 \u202e emoji 🚀", "a & b", LIKE_DRAWING])
def test_any_text_can_stand_in_a_chart(name):
    lines = Page(line_chart(name, [Series(name, [0, 1], [1, 2])], name, name, [Mark(0, name)]).svg)
    assert lines.texts.count(name) == 4 and f"{name} 1" in lines.texts  # the line, both axes, the mark; a point
    points = Page(scatter("T", name, np.arange(3.0), np.arange(3.0), np.arange(3), [name] * 3).svg)
    assert points.texts.count(name) == 3
    for page in (lines, points):
        assert name in page.tags[0][1]["aria-label"] and any(n == "use" and "href" in a for n, a in page.tags)
        assert not re.search(r"#0000\w\w", " ".join(a.get("style", "") for _, a in page.tags))


def test_charts_of_one_page_share_no_id():
    def ids(salt):
        return set(re.findall(r' id="([^"]+)"', line_chart("T", [Series("", [0, 1], [1, 2])], "x", "y", salt=salt).svg))

    assert ids("a") and ids("a").isdisjoint(ids("b")) and ids("a") == ids("a")


def step(at, steps, stage, contrast, experts=(1, 2)):
    return {"step": at, "steps": steps, "phase": f"stage {stage}", "epoch": 1, "contrast": contrast, "lr": 0.1 * at,
            "examples": 8 * steps, "seconds": 2.0 * steps, "experts": list(experts)}


def test_long_trainings_are_thinned_without_losing_a_step():
    steps = [step(10 * i, 10, 1 if i <= 7 else 2, float(i)) for i in range(1, 11)] + [step(103, 3, 2, 11.0)]
    few = thinned(steps, 4)
    assert [e["step"] for e in few] == [30, 60, 70, 100, 103] and sum(e["steps"] for e in few) == 103
    assert [e["contrast"] for e in few] == [2.0, 5.0, 7.0, 9.0, 11.0]
    assert few[0]["experts"] == [3, 6] and few[0]["rate"] == 4.0 and few[0]["lr"] == 2.0
    assert [e["step"] for e in thinned(steps)] == [e["step"] for e in steps] and thinned([]) == []
    assert thinned([step(1, 1, 1, 1.0), step(2, 3, 1, 5.0)], 1)[0]["contrast"] == 4.0  # weighed by steps


def test_charts_of_sparse_logs():
    assert charts(Training("T", [], [], {"epoch": 1})) == []
    strayed = Training("T", [], [step(1, 1, 1, None), step(2, 1, 1, None)], {"epoch": 1})
    assert [c.title for c in charts(strayed)] == ["Learning rate", "Speed", "Experts while training"]
    by_epoch = Training("T", [{"phase": "", "epoch": e, "loss": 1 / e} for e in (1, 2)], [], {})
    assert [c.title for c in charts(by_epoch)] == ["Training loss"]


def test_phases_and_numbers_that_are_not_known_yet():
    epochs = [{"phase": name, "epoch": e, "validation_ndcg@10": 0.1, "validation_loss": 5.0, "validation_users": 9}
              for name in ("pretrain", "distil") for e in (1, 2)]
    steps = [{"step": i, "steps": 1, "phase": "pretrain" if i < 3 else "distil", "kl_loss": 1.0} for i in (1, 2, 3)]
    training = Training("T", epochs, steps, {"phase": "distil", "epoch": 1})
    assert [training.is_kept(e) for e in epochs] == [False, False, True, False]
    ranked, loss = validation_charts(training)
    assert "distil at 1." in ranked.svg and "kept at 1." in ranked.svg and loss.title == "Validation: loss"
    over_steps = charts(training)[2]
    assert over_steps.title == "Kl loss" and "distil at 3." in over_steps.svg


def test_deviations_stand_where_there_are_several_seeds(report):
    row = {"model": "A", "seeds": 3, "recall@5": 0.2, "recall@5_sd": 0.01, "ndcg@5": 0.1, "ndcg@5_sd": 0.02, "mrr": 0.1}
    results = Results("q.json", "test", ("recall@5", "ndcg@5", "mrr"), (row, {**row, "model": "B", "seeds": 1}))
    texts = [t.strip() for t in Page(render(dataclasses.replace(report, results=results))).texts]
    assert texts.count("0.2000 ± 0.0100") == texts.count("0.1000 ± 0.0200") == 1 and texts.count("0.2000") == 1


# -- other methods ----------------------------------------------------------------------------------------------------


def test_a_method_without_llm_router_training_and_embeddings(report):
    note = {"method": "ease", "config": {"l2": 300.0, "nested": {"a": [1, 2]}},
            "parts": [{"part": "text <vectors>", "gain": 0.0123456789}, {"part": "seen offset", "gain": -0.1, "n": 3}]}
    bare = dataclasses.replace(report, model=note, trainings=(), results=None, experts=None, items=None,
                               data={"table1": {"users": 3}, "skipped_lines": 4, "none": 0,
                                     "unmatched": {"items": 7, "why": "<b>other</b> ids"}},
                               examples=tuple(dataclasses.replace(e, expert=None) for e in report.examples))
    page = Page(render(bare))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert page.faults == [] and [i for i in ids if i in [*SECTIONS, "parts"]] == [
        "summary", "results", "parts", "examples", "losses", "settings"]
    assert {"ease", "text <vectors>", "0.0123457", "-0.1", "l2", "300", "1, 2", "skipped lines"} <= {
        t.strip() for t in page.texts}
    assert "7 item ids of the interactions are not among the items: <b>other</b> ids" in page.texts
    assert "none" not in page.texts and not any("expert" in t for t in page.texts)
    assert bare.numbers()["experts"] is None and bare.numbers()["map"] is None


@pytest.mark.parametrize(("method", "absent", "sections"), [
    ("sasrec", {"experts"}, {"data", "eval", "id_model"}),
    ("ease", {"experts", "map", "training"}, {"data", "eval", "neighbours"}),
    ("popularity", {"experts", "map", "training"}, {"data", "eval", "neighbours"}),
])
def test_every_method_has_a_report(run_folder, fit, method, absent, sections):
    fit(run_folder / "data", run_folder / method, method)
    found = collect(find(run_folder / method))
    page = Page(render(found))
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert page.faults == [] and {s for s in SECTIONS if s not in ids} == absent
    assert set(found.model["config"]) == sections and len(found.examples) == 5


def test_it_tells_how_the_data_were_prepared(run_folder, fit):
    """A model.json of earlier versions tells the data settings of the fit's config, which were not used."""
    fit(run_folder / "data", run_folder / "earlier", "ease")
    file = run_folder / "earlier" / "model.json"
    note = json.loads(file.read_text())
    prepared = Dataset.load(run_folder / "data").meta["settings"]
    assert note["config"]["data"] == {**prepared, "item_columns": []} and prepared["min_user_interactions"] == 2
    file.write_text(json.dumps({**note, "config": {**note["config"], "data": {"min_user_interactions": 5}}}))
    assert collect(find(run_folder / "earlier")).model["config"]["data"] == prepared


def test_the_closed_form_of_laser_and_a_distilled_model(run_folder, fit):
    closed = {"id_model": {"kind": "none"}, "prompt": {"layout": "none", "item_side": "mean"},
              "mformer": {"prefix": "none"}, "head": {"whiten_dims": 8, "seen_offset": True},
              "neighbours": {"count": 6, "share": 0.1}, "train": {"stage_one_epochs": 0, "stage_two_epochs": 0}}
    fit(run_folder / "data", run_folder / "instant", **closed)
    instant = collect(find(run_folder / "instant"))
    assert instant.trainings == () and instant.experts is None and instant.items.n_items == 14
    assert "student" not in instant.model["config"] and "neighbours" in instant.model["config"]
    teacher = LaserRecommender.from_pretrained(run_folder / "model", device="cpu")
    distil(teacher, Dataset.load(run_folder / "data"), run_folder / "small",
           StudentConfig(hidden=16, epochs=2, batch_size=16), progress=False)
    small = collect(find(run_folder / "small"))
    assert [t.name for t in small.trainings] == ["laser", "ID model (sasrec)"] and small.trainings[0].steps
    assert "student" in small.model["config"] and small.experts is None
    teacher_seconds = small.model["training"]["teacher"]["seconds"]
    assert teacher_seconds == teacher.facts["training"]["seconds"] != small.model["training"]["seconds"]
    assert small.validated == {name: value for name, value in small.model["student"]["validation"]["student"].items()
                               if name != "seconds"}
    for found in (instant, small):
        page = Page(render(found))
        assert page.faults == [] and "experts" not in [a.get("id") for _, a in page.tags]


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=[("light", 360), ("dark", 360), ("light", 1280)], ids=lambda p: f"{p[0]}-{p[1]}")
def page(browser, html, tmp_path, request):
    scheme, width = request.param
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.problems, page.requests, page.width, page.scheme = [], [], width, scheme
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: page.problems.append(line.text) if line.type in ("error", "warning") else None)
    page.on("request", lambda asked: page.requests.append(asked.url))
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_load_state("networkidle")
    yield page
    context.close()


@needs_browser
def test_in_chromium(page):
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.problems == [] and [u for u in page.requests if not u.startswith(("file://", "data:,"))] == []
    assert len([u for u in page.requests if u.startswith("file://")]) == 1
    assert page.evaluate("window.hurt") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= page.width
    wide = page.evaluate("""[...document.querySelectorAll('main *:not(svg *)')].filter(n => !n.closest('.scroll') &&
        n.getBoundingClientRect().right > innerWidth + 1).map(n => n.tagName + '.' + n.className)""")
    assert wide == []
    smallest = page.evaluate("""Math.min(...[...document.querySelectorAll('svg text')].map(
        t => t.getBoundingClientRect().height).filter(h => h))""")
    assert smallest >= 9  # letters in charts, in CSS pixels
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(21, 23, 26)" if page.scheme == "dark" else "rgb(250, 250, 248)")


@needs_browser
def test_a_group_can_be_picked_on_the_map(page):
    opacity = "c => Number(getComputedStyle(document.querySelector('.map g.' + c)).opacity)"
    before = page.evaluate(opacity, "g1")
    page.check("#only0")
    assert page.evaluate(opacity, "g1") < 0.1 < 0.5 < page.evaluate(opacity, "g0")
    page.check("#all")
    assert page.evaluate(opacity, "g1") == before
