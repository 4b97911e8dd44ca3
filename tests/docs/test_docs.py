"""The documentation site: built with warnings as errors, complete, linked, and the same in a browser as on paper."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from snippets import ROOT, SECTIONS, leaves

from laserrec.cli.main import app
from laserrec.config import load_config
from laserrec.presets import PRESETS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src",
          "object": "data", "embed": "src", "link": "href", "use": "href", "image": "href"}
"""Tag -> the attribute by which a page loads something. An <a> is only followed."""


class Page(HTMLParser):
    """What one built page holds."""

    def __init__(self, file: Path):
        super().__init__()
        self.file, self.ids, self.links, self.loads, self.rows = file, set(), [], [], []
        self._row: list[str] | None = None
        self.words: list[str] = []
        self.preformatted: list[str] = []
        self._in_pre = False
        self.feed(file.read_text(encoding="utf-8"))
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs["id"]} if attrs.get("id") else set()
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        if attrs.get(LOADED.get(tag)):
            self.loads.append(attrs[LOADED[tag]])
        if tag == "pre":
            self.preformatted.append("")
            self._in_pre = True
        if tag == "tr":
            self._row = []
        if tag in ("td", "th") and self._row is not None:
            self._row.append("")

    def handle_endtag(self, tag):
        if tag == "pre":
            self._in_pre = False
        if tag == "tr":
            self.rows.append([cell.strip() for cell in self._row])
            self._row = None

    def handle_data(self, data):
        self.words.append(data)
        if self._in_pre:
            self.preformatted[-1] += data
        if self._row:
            self._row[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    made = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d",
                           str(out / "trees"), "docs", str(out / "html")], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return out / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {str(file.relative_to(site)): Page(file) for file in site.rglob("*.html")}


def test_every_source_is_a_page(site, pages):
    sources = [p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")]
    assert len(sources) >= 11 and {str(p.with_suffix(".html")) for p in sources} <= pages.keys()
    assert not any("<!-- generated" in p.file.read_text(encoding="utf-8") for p in pages.values())


def test_all_commands_and_their_flags_are_in_the_reference(pages):
    page = pages["reference/cli.html"]
    commands = leaves(app)
    assert {("prepare",), ("serve",), ("backbone", "fetch"), ("reproduce", "cold-start")} <= commands.keys()
    for words, command in commands.items():
        assert "-".join(("laserrec", *words)) in page.ids
        assert re.search(rf"laserrec {' '.join(words)} (\[OPTIONS\]|[A-Z\[])", page.text), words
        for argument in command.assemble_argument_collection(default_parameter=app.default_parameter):
            for name in () if argument.children else argument.names:  # those with children are whole sections
                if name.startswith("--") and "." not in name:
                    assert name in page.text, (words, name)
                elif name.startswith("--data"):  # where they are all that there is: prepare
                    assert name in page.text
    assert not re.search(r" -m (?!laserrec)", page.text)  # how the site was built is nobody's usage
    assert not re.search(r"--train\.(?!lr)", page.text)  # the settings have a page of their own


def test_examples_of_the_reference_parse(pages):
    lines = re.findall(r"^\$ (laserrec .*)$", "".join(pages["reference/cli.html"].words), re.MULTILINE)
    assert len(lines) >= len(leaves(app))
    for line in lines:
        app.parse_args(shlex.split(line)[1:], print_error=False, exit_on_error=False)


def plain(value):
    """A setting's value as the reference writes it."""
    value = json.loads(json.dumps(value))  # enums are text then, tuples lists
    if isinstance(value, list):
        return read(", ".join(map(str, value)))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return float(value) if isinstance(value, int | float) else value


def read(cell):
    try:
        return float(cell)
    except ValueError:
        return cell


def test_every_setting_with_its_value_in_every_preset(pages):
    page = pages["reference/configuration.html"]
    rows = {row[0]: row for row in page.rows}
    head = rows["setting"]
    named = {name: column for column, text in enumerate(head) for name in text.split(", ")}
    assert {"default", *PRESETS} <= named.keys()
    flags = []
    for section, kind in SECTIONS.items():
        for field, setting in kind.model_fields.items():
            row = rows[f"{section}.{field}"]
            assert f"setting-{section}-{field}".replace("_", "-") in page.ids
            for preset in PRESETS:
                value = getattr(getattr(load_config(preset), section), field)
                assert read(row[named[preset]]) == plain(value), (section, field, preset)
            assert read(row[named["default"]]) == plain(setting.default), (section, field)
            assert " ".join(setting.description.replace("`", "").split()) in page.text
            flags += re.findall(rf"--{section}\.{field}(?= |$)".replace("_", "-"), page.text)[:1]
    count = sum(len(kind.model_fields) for kind in SECTIONS.values())
    assert len(flags) == count == len(set(flags))
    known = {name for a in app["fit"].assemble_argument_collection() for name in a.names}
    assert {*flags} <= known


def test_public_python_is_in_the_reference(pages):
    from laserrec import LaserRecommender

    ids = {name for path, page in pages.items() if path.startswith("reference/api") for name in page.ids}
    methods = [n for n, m in vars(LaserRecommender).items() if not n.startswith("_") and getattr(m, "__doc__", None)]
    assert {"fit", "recommend", "add_items"} <= {*methods}
    assert {f"laserrec.recommender.recommender.LaserRecommender.{n}" for n in methods} <= ids
    assert {f"laserrec.config.{kind.__name__}" for kind in SECTIONS.values()} <= ids


def test_every_public_name_of_a_documented_room_is_in_the_reference(pages):
    rooms = [Path(path).stem for path in pages if path.startswith("reference/api/")]
    assert {"recommender", "methods", "data"} <= {*rooms}
    for room in {*rooms} - {"config"}:
        page = pages[f"reference/api/{room}.html"]
        for file in (ROOT / "laserrec" / room).rglob("[!_]*.py"):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            names = re.findall(r"^(?:class|def) ([A-Za-z]\w*)", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert {f"{module}.{name}" for name in names} <= page.ids, module


def test_indented_lines_of_a_docstring_keep_their_form(pages):
    block = next(text for text in pages["reference/api/data.html"].preformatted if "items.parquet" in text)
    columns = [line.index("Int32") for line in block.splitlines() if "Int32" in line]
    assert len(columns) == 3 and len({*columns}) == 1, block  # the three files' columns stand below each other


def test_every_module_is_in_the_layout(pages):
    page = pages["code.html"]
    modules = [file.stem for file in (ROOT / "laserrec").rglob("*.py") if not file.stem.startswith("_")]
    assert len(modules) > 80 and {*modules} == {row[0] for row in page.rows} - {"module"}
    assert all(row[1] for row in page.rows)


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for page in pages.values():
        assert not [x for x in page.loads if urlsplit(x).scheme not in ("", "data") or x.startswith("//")], page.file
    for sheet in site.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", sheet.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", text), sheet


def test_links_between_pages_lead_to_places(site, pages):
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path))) if parts.path else name
            assert (site / target).is_file(), f"{name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids | {""}, f"{name}: {link}"


@pytest.mark.skipif(CHROMIUM is None and not os.environ.get("LASERREC_REQUIRE_BROWSER"),
                    reason="no chromium on this machine (Debian: apt install chromium)")
def test_in_a_browser_light_and_dark_wide_and_narrow(site, pages):
    from playwright.sync_api import sync_playwright

    problems, ground = [], set()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for scheme, width in (("light", 1200), ("dark", 360)):
            page = browser.new_context(viewport={"width": width, "height": 780}, color_scheme=scheme).new_page()
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
            for name in pages:
                page.goto((site / name).as_uri())
                if (wide := page.evaluate("document.documentElement.scrollWidth")) > width:
                    problems.append(f"{name} is {wide} wide at {width}")
                ground.add((scheme, page.evaluate("getComputedStyle(document.body).backgroundColor")))
            page.goto((site / "concepts.html").as_uri())
            for drawing in page.locator("figure.drawing svg").all():
                assert 200 < drawing.bounding_box()["width"] <= width
            assert page.locator("figure.drawing svg").count() == 2
        browser.close()
    assert problems == []
    assert len(ground) == 2  # one colour for each scheme
