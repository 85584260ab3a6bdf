"""The page of a report: valid, self-contained, with the figures of the tables; also in a browser, if there is one."""

import base64
import re
import shutil
from html.parser import HTMLParser

import pytest

from probsurgery.pipeline.analysis.report import report
from probsurgery.pipeline.config import FitConfig, ProbSettings, SurgerySettings, SweepConfig
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.fitting.sweep import sweep
from probsurgery.pipeline.store.cache import Cache
from support import edit_manifest, refused, write_cache

HOSTILE = '"><script>alert(1)</script>'


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = write_cache(tmp_path_factory.mktemp("page") / "cache", {"a": 60, "b": 40})
    files = {"pretrained": {"source": HOSTILE, "sha256": "0" * 64}}
    edit_manifest(path, lambda manifest: manifest.update(files=files))
    fit(FitConfig(path, ProbSettings(hidden=8, steps=60)))
    fit(FitConfig(path, SurgerySettings(rank=4, steps=60)))
    sweep(SweepConfig(path, ("surgery",), {"rank": (2, 4), "steps": (60,)}, seed=(0, 1)))
    return path


@pytest.fixture
def page(cache, run, tmp_path):
    path = tmp_path / "report.html"
    status, _, err = run("report", "--cache", cache, "--html", path)
    assert (status, f"{path}: written" in err) == (0, True)
    return path


class Elements(HTMLParser):
    """Every start tag, whether tags are closed as they were opened, and the text of the cells."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.cells = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def parsed(path):
    elements = Elements()
    elements.feed(path.read_text())
    assert elements.open == []
    return elements


def test_every_figure_of_every_table_is_there(page, cache):
    elements = parsed(page)
    (result,) = report(cache)
    cells = [cell.strip() for cell in elements.cells]
    expected = []
    for table in result.tables:
        expected += [table.first, *table.columns]
        for line in table.lines:
            expected += [table.label(line), *(table.text(line, column) for column in table.columns)]
    assert cells[: len(expected)] == expected
    captions = re.findall(r"<h3[^>]*>(.*?)</h3>", page.read_text())
    assert len(captions) == len(result.tables) + 1  # and the table of uncertainty
    assert all("transductive" in caption for caption in captions)


def test_figures_are_in_the_page_and_nothing_is_fetched(page):
    elements = parsed(page)
    images = [attributes for tag, attributes in elements.tags if tag == "img"]
    assert len(images) == 5  # bias, rank, calibration, coverage, projection
    for image in images:
        head, _, data = image["src"].partition(",")
        assert head == "data:image/svg+xml;base64"
        assert b"</svg>" in base64.b64decode(data, validate=True)
        assert image["alt"]
    tags = {tag for tag, _ in elements.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base"}
    named = [value for _, attributes in elements.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(value.startswith("data:") for value in named)
    assert "url(" not in page.read_text()
    assert "@import" not in page.read_text()


def test_provenance_is_there_and_foreign_markup_is_escaped(page, cache):
    text = page.read_text()
    opened = Cache(cache)
    assert opened.fingerprint in text
    assert opened.content in text
    assert HOSTILE not in text
    assert "&lt;script&gt;alert(1)" in text


def test_it_suits_phones_and_print(page):
    text = page.read_text()
    assert '<meta name="viewport" content="width=device-width' in text
    assert "@media print" in text
    assert text.count('<div class="scroll">') == text.count("<table ")


def test_a_page_that_cannot_be_written_is_refused_and_the_old_one_stays(page, cache, run, tmp_path):
    refused(run("report", "--cache", cache, "--html", tmp_path), tmp_path, "a file name in a folder that exists")
    refused(run("report", "--cache", cache, "--html", tmp_path / "no" / "x.html"), "no/x.html")
    assert not (tmp_path / "no").exists()
    before = page.read_text()
    refused(run("report", "--cache", tmp_path / "none", "--html", page), "does not exist")
    assert page.read_text() == before


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_browser(page, width):
    """No console errors, every figure drawn, nothing requested, no horizontal scroll."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": width, "height": 800})
        problems, requests = [], []
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri())
        drawn = tab.evaluate(
            "[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
        )
        scrolls = tab.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        browser.close()
    assert problems == []
    assert len(drawn) == 5
    assert all(complete and natural > 0 and 0 < shown <= width for complete, natural, shown in drawn)
    assert not scrolls
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
