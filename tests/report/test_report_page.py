"""The page: each section, nothing of a title becomes markup, nothing is fetched, and it stands in a real Chromium."""

import os
import re
import shutil
from html.parser import HTMLParser

import pytest
from evil import EVIL, EVIL_BRAND, EVIL_CATEGORY

from laserrec.report.charts import Mark, Series, line_chart, number, ticks
from laserrec.report.collect import Curves, collect
from laserrec.report.curves import step_charts, thinned, validation_chart
from laserrec.report.markup import Markup, join, tag
from laserrec.report.page import render
from laserrec.report.places import find

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
needs_browser = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("LASERREC_REQUIRE_BROWSER"),
                                   reason="no chromium on this machine (Debian: apt install chromium)")
SECTIONS = ["summary", "results", "training", "experts", "map", "examples", "settings"]


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
    hrefs = {a["href"] for n, a in page.tags if n in ("a", "use")}
    assert hrefs <= {f"#{i}" for i in ids}
    assert all(a.get("aria-label") for n, a in page.tags if n == "svg" and a.get("role") == "img")
    assert all("role" in a or a.get("aria-hidden") == "true" for n, a in page.tags if n == "svg")
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
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for n, a in page.tags if n == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "://" not in re.sub(r"xmlns=\S+", "", html)


def test_it_is_the_same_every_time(run_folder, html):
    assert render(collect(find(run_folder))) == html


def test_markup_escapes_all_but_itself():
    assert tag("td", "<a>&", Markup("<b>x</b>"), [1, None, "'"], title='"q"', class_=None) == (
        '<td title="&quot;q&quot;">&lt;a&gt;&amp;<b>x</b>1&#x27;</td>')
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">' and join() == ""


# -- charts -----------------------------------------------------------------------------------------------------------


def test_ticks_and_numbers():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and ticks(3, 3) == [3]
    assert ticks(0.031, 0.094) == [0.04, 0.05, 0.06, 0.07, 0.08, 0.09] and ticks(-1.2, 1100)[-1] == 1000
    for low, high in ((7.1, 7.13), (1e-5, 9e-4), (-3, 8), (0, 123456)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 8 and low <= found[0] and found[-1] <= high * (1 + 1e-9)
    assert [number(x) for x in (0, 1234.5, 0.12345, 2e-6, float("nan"))] == ["0", "1,234", "0.1235", "2.0e-06", "–"]


def test_a_line_has_gaps_marks_and_its_words():
    nan = float("nan")
    chart = line_chart("T", [Series("a", [0, 1, 2, 3], [1, nan, 3, 2]), Series("b", [0], [2])], "step", "loss",
                       [Mark(2, "kept")])
    paths = re.findall(r'<path d="([^"]*)" class="line s1"', chart)[1]  # the first is the legend's
    assert paths.count("M") == 2 and paths.count("L") == 1
    assert "a goes from 1 to 2, lowest 1, highest 3." in chart and "kept at 2." in chart
    assert Page(chart).faults == []
    assert "no numbers" in line_chart("T", [Series("", [0], [nan])], "x", "y")
    assert "NaN" not in line_chart("T", [Series("", [1, 1], [5, 5])], "x", "y")


def step(at, steps, stage, contrast, experts=(1, 2)):
    return {"step": at, "steps": steps, "stage": stage, "epoch": 1, "contrast": contrast, "lr": 0.1 * at,
            "examples": 8 * steps, "seconds": 2.0 * steps, "experts": list(experts)}


def test_long_trainings_are_thinned_without_losing_a_step():
    steps = [step(10 * i, 10, 1 if i <= 7 else 2, float(i)) for i in range(1, 11)] + [step(103, 3, 2, 11.0)]
    few = thinned(steps, 4)
    assert [e["step"] for e in few] == [30, 60, 70, 100, 103] and sum(e["steps"] for e in few) == 103
    assert [e["contrast"] for e in few] == [2.0, 5.0, 7.0, 9.0, 11.0]
    assert few[0]["experts"] == [3, 6] and few[0]["rate"] == 4.0 and few[0]["lr"] == 3.0
    assert [e["step"] for e in thinned(steps)] == [e["step"] for e in steps] and thinned([]) == []
    assert thinned([step(1, 1, 1, 1.0), step(2, 3, 1, 5.0)], 1)[0]["contrast"] == 4.0  # weighed by steps


def test_charts_of_sparse_logs():
    bare = Curves([], [], {"epoch": 1})
    assert step_charts(bare) == [] and validation_chart(bare) is None
    strayed = Curves([], [step(1, 1, 1, None), step(2, 1, 1, None)], {"epoch": 1})
    titles = re.findall("<figcaption>(.*?)</figcaption>", "".join(step_charts(strayed)))
    assert titles == ["Learning rate", "Speed", "Experts while training"]


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
    opacity = "c => Number(getComputedStyle(document.querySelector('.map use.' + c)).fillOpacity)"
    before = page.evaluate(opacity, "g1")
    page.check("#only0")
    assert page.evaluate(opacity, "g1") < 0.1 < 0.5 < page.evaluate(opacity, "g0")
    page.check("#all")
    assert page.evaluate(opacity, "g1") == before
