"""The page in a real Chromium against the real server: search, compose by keyboard and mouse, share, mistakes."""

import os
import shutil

import pytest
from running import running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

pytestmark = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("LASERREC_REQUIRE_BROWSER"),
                                reason="no chromium on this machine (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def port(model_folder):
    with running(model_folder, "--threads", "1") as port:
        yield port


@pytest.fixture
def page(browser, port):
    context = browser.new_context(viewport={"width": 360, "height": 780}, color_scheme="dark")
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
    page.goto(f"http://127.0.0.1:{port}/")
    yield page
    assert page.problems == []
    context.close()


def until(page, expression, argument=None):
    """The page's policy forbids eval, which playwright's own wait_for_function needs."""
    for _ in range(100):
        if page.evaluate(expression, argument):
            return
        page.wait_for_timeout(50)
    raise AssertionError(expression)


def titles(page, part):
    return page.locator(f"#{part} li .title:not(.soft)").all_inner_texts()


def pick(page, words, downs=1):
    page.fill("#query", words)
    page.wait_for_selector("#found li")
    until(page, "w => document.querySelector('#found li .title').textContent.includes(w)", words)
    for _ in range(downs):
        page.press("#query", "ArrowDown")
    page.press("#query", "Enter")


def test_compose_by_keyboard_and_see_why(page):
    assert "12 items" in page.inner_text("#facts")
    pick(page, "red")
    page.wait_for_selector("#recommended li")
    assert len(titles(page, "history")) == 1 and len(titles(page, "recommended")) == 10
    first = titles(page, "history")[0]
    assert first not in titles(page, "recommended")  # the history is left out
    assert f"Nearest in the history: {first}" in page.inner_text("#recommended li:first-child")
    assert "The router chose query expert" in page.inner_text("#why")
    page.uncheck("#exclude")
    page.select_option("#k", "20")
    until(page, "document.querySelectorAll('#recommended li').length === 12")


def test_click_reorder_remove_and_share(page, port):
    pick(page, "red")
    page.wait_for_selector("#recommended li")
    added = titles(page, "recommended")[0]
    page.click("#recommended li:first-child button")
    until(page, "document.querySelectorAll('#history li').length === 2")
    assert titles(page, "history")[1] == added
    page.click("#history li:nth-child(2) button:has-text('↑')")
    assert titles(page, "history")[0] == added
    url = page.url
    assert "#i" in url and "," in url
    page.goto("about:blank")
    page.goto(url)
    page.wait_for_selector("#history li:nth-child(2)")
    assert titles(page, "history")[0] == added
    page.click("#history li:first-child button:has-text('×')")
    until(page, "document.querySelectorAll('#history li').length === 1")
    page.click("#clear")
    assert page.is_visible("#empty") and titles(page, "recommended") == []


def test_nothing_found_and_width(page):
    page.fill("#query", "no such words")
    until(page, "document.querySelector('#count').textContent === 'Nothing found.'")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"  # dark


def test_the_api_page_is_drawn_from_this_server_alone(browser, port):
    context, hosts = browser.new_context(), set()
    page = context.new_page()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.goto(f"http://127.0.0.1:{port}/docs")
    page.wait_for_selector('.opblock-summary-path[data-path="/v1/recommend"]')
    page.wait_for_timeout(500)
    assert hosts == {f"127.0.0.1:{port}"}
    context.close()


def test_titles_are_text_and_never_markup(page, port):
    page.evaluate("""() => fetch('/v1/items', {method: 'POST', headers: {'Content-Type': 'application/json'}, body:
        JSON.stringify({items: [{item_id: 'a/b,c', title: '<svg onload="window.hurt=1"> odd'}]})})""")
    until(page, "fetch('/v1/items?query=onload').then(a => a.json()).then(b => b.total === 1)")
    pick(page, "odd")
    page.wait_for_selector("#recommended li")
    assert titles(page, "history") == ['<svg onload="window.hurt=1"> odd']
    assert page.evaluate("window.hurt") is None
    page.reload()  # an id with a comma and a slash comes back from the address
    page.wait_for_selector("#history li")
    assert titles(page, "history") == ['<svg onload="window.hurt=1"> odd']
