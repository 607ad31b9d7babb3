"""The page: rendered from whole, partial and odd sections, and looked at in a real browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dibit.reproduce.report import render
from dibit.reproduce.sections import SECTIONS
from dibit.reproduce.show.accuracy import _reach
from dibit.tools.errors import UserError
from tests.reproduce.examples import all_sections, section

pytestmark = pytest.mark.filterwarnings("error:.*layout not applied", "error:Glyph")

FIGURES = {
    *("memory-arxiv", "memory-flickr", "blocks", "variance", "variance-amazon-computers-sage", "accuracy", "tuned"),
    *(f"distribution-amazon-computers-sage-{setting}" for setting in ("exact", "i-exact", "no-projection")),
}
TABLES = {
    *("memory-arxiv", "memory-flickr", "blocks-timing", "blocks-amazon-computers-sage", "blocks-cora-sage"),
    *("variance", "variance-amazon-computers-sage-60", "distribution-amazon-computers-sage-60"),
    *("accuracy", "accuracy-paper", "tuned", "runs", "versions"),
}
FOLDED = {
    *("memory-arxiv-kinds", "memory-flickr-kinds", "variance-bits", "variance-amazon-computers-sage-60-draws"),
    "distribution-amazon-computers-sage-0",
}


def _write(folder: Path, sections: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in sections.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def _ids(page: str, prefix: str) -> set[str]:
    return set(re.findall(rf'id="{prefix}-([^"]+)"', page))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(_write(tmp_path_factory.mktemp("study"), all_sections()))


def test_every_figure_and_table(page: Path) -> None:
    text = page.read_text()
    assert _ids(text, "fig") == FIGURES
    assert _ids(text, "tab") == TABLES | FOLDED
    files = {path.stem for path in (page.parent / "figures").iterdir()}
    assert files == FIGURES
    for path in (page.parent / "figures").iterdir():
        assert ElementTree.fromstring(path.read_bytes()).tag.endswith("svg")


def test_it_holds_everything_itself(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"(?:src|srcset)=\"(?!data:)", text) == []
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert re.findall(r'href="(?!#|data:,|https://arxiv\.org/)', text) == []


def test_figures_have_descriptions_with_numbers(page: Path) -> None:
    alts = [html.unescape(alt) for alt in re.findall(r'alt="([^"]*)"', page.read_text())]
    assert len(alts) == len(FIGURES)
    assert all(len(re.findall(r"\d\.\d", alt)) > 5 for alt in alts)


def test_remembered_numbers_are_marked_in_words_and_to_the_eye(page: Path) -> None:
    text = page.read_text()
    cells = re.findall(r"<t[dh][^>]*>[^\n]*71\.95 ± 0\.16[^\n]*", text)
    assert cells
    assert all('remembered"' in cell and "†" in cell for cell in cells)
    assert text.count("71.95") == len(cells)
    assert "Remembered, not confirmed" in text
    assert "(remembered, not confirmed)" in text


def test_the_same_files_give_the_same_bytes(page: Path, tmp_path: Path) -> None:
    again = render(_write(tmp_path / "again", all_sections()))
    assert again.read_bytes() == page.read_bytes()
    for path in (page.parent / "figures").iterdir():
        assert (again.parent / "figures" / path.name).read_bytes() == path.read_bytes()


def test_matplotlib_of_the_caller_is_left_alone(tmp_path: Path) -> None:
    import matplotlib as mpl

    mpl.rcParams["font.size"] = 77
    try:
        before, backend = _parameters(mpl), mpl.get_backend(auto_select=False)
        text = render(_write(tmp_path / "x", {"memory": all_sections()["memory"]})).read_text()
        assert _parameters(mpl) == before
        assert mpl.get_backend(auto_select=False) == backend
        assert "77px" not in base64.b64decode(re.findall(r"src=\"data:image/svg.xml;base64,([^\"]+)", text)[0]).decode()
    finally:
        mpl.rcdefaults()


def _parameters(mpl: Any) -> dict[str, Any]:
    """matplotlib's parameters without the backend, which is chosen when it is looked at."""
    return {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"}


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_that_have_not_been_run_are_named(name: str, tmp_path: Path) -> None:
    results = all_sections()[name]
    text = render(_write(tmp_path / "one", {name: results})).read_text()
    assert [n for n in SECTIONS if f"<code>dibit reproduce {n} --out DIR</code></li>" in text] == [
        n for n in SECTIONS if n != name
    ]
    assert [n for n in SECTIONS if f'<section id="{n}">' in text] == [name]


def test_no_section_at_all(tmp_path: Path) -> None:
    text = render(_write(tmp_path / "none", {})).read_text()
    assert "Nothing has been measured yet." in text
    assert text.count("<li>", text.index('id="missing"'), text.index("</section>")) == len(SECTIONS)


def test_empty_sections(tmp_path: Path) -> None:
    empty: dict[str, dict[str, Any]] = {
        "memory": {"shapes": [{"name": "arxiv", "nodes": 1, "edges": 1, "rows": []}]},
        "blocks": {"timing": None, "graphs": [{"name": "cora", "model": "sage", "rows": []}], "paper": {}},
        "variance": {"table": [], "measured": [{"graph": "cora", "model": "sage", "epoch": 0, "rows": []}]},
        "distribution": {"bins": 60, "graphs": [{"name": "cora", "model": "sage", "rows": []}], "verdicts": []},
        "accuracy": {"rows": [], "skipped": [], "paper": []},
        "tuned": {"rows": [], "together": {}},
    }
    text = render(_write(tmp_path / "e", {n: section(n, r, finished=False) for n, r in empty.items()})).read_text()
    assert text.count("No results yet.") == len(SECTIONS)
    assert text.count("This run was cut or still goes on") == len(SECTIONS)


@pytest.mark.filterwarnings("error")
def test_parts_of_sections(tmp_path: Path) -> None:
    sections = all_sections()
    for part in sections.values():
        part["finished"] = False
        del part["machine"], part["versions"]
    shapes = sections["memory"]["results"]["shapes"]
    shapes[0]["rows"], shapes[1]["rows"] = shapes[0]["rows"][:1], shapes[1]["rows"][3:4]
    shapes[0]["rows"][0] |= {"closed_mb": None, "closed_cuda_mb": None, "allocator_mb": None}
    blocks = sections["blocks"]["results"]
    blocks["timing"]["rows"] = blocks["timing"]["rows"][:1]
    blocks["graphs"][0]["rows"] = blocks["graphs"][0]["rows"][:2]
    blocks["graphs"][0]["rows"][1]["test"] = blocks["graphs"][0]["rows"][1]["test"][:1]  # seeds still to come
    blocks["graphs"][1]["rows"] = blocks["graphs"][1]["rows"][3:4]
    blocks["graphs"][1]["rows"][0] |= {"gradient_error": {}, "test": []}
    variance = sections["variance"]["results"]
    variance["table"] = variance["table"][-1:]
    variance["measured"][0]["rows"] = variance["measured"][0]["rows"][:1]
    variance["measured"][0]["rows"][0] |= {"fitted": None, "module": ""}
    distribution = sections["distribution"]["results"]
    distribution["graphs"][0]["rows"] = distribution["graphs"][0]["rows"][:3]
    accuracy = sections["accuracy"]["results"]
    accuracy["rows"] = accuracy["rows"][1:3]
    accuracy["rows"][0]["difference"] |= {"low": None, "high": None}
    accuracy["rows"][1] |= {"difference": None, "test": []}
    tuned = sections["tuned"]["results"]
    tuned["rows"] = tuned["rows"][1:5]
    tuned["rows"][0]["difference"] |= {"low": None, "high": None, "values": None}
    tuned["rows"][0] |= {"verdict": None, "epochs_ratio": None, "noise": None, "norm": None, "published": None}
    tuned["rows"][3] |= {"difference": None, "verdict": None, "test": []}
    tuned["together"] = None
    text = render(_write(tmp_path / "p", sections)).read_text()
    assert text.count("This run was cut or still goes on") == len(SECTIONS)
    assert len(_ids(text, "fig")) == 8
    assert "(model)" in text


@pytest.mark.filterwarnings("error")
def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "$x_1$<script>alert(1)</script> & '\"' \u001b[31m\x00\ud800"
    sections = all_sections()
    for name in SECTIONS:
        sections[name] = _replaced(sections[name], {"amazon-computers", "arxiv", "ogbn-arxiv"}, evil)
    sections["distribution"]["results"]["verdicts"] = [evil]
    sections["memory"]["machine"]["processor"] = evil
    page = render(_write(tmp_path / "evil", sections))
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#39;&#34;&#39;" in text
    assert {c for c in text if not c.isprintable()} <= set("\n\u00a0")
    figures = list((page.parent / "figures").iterdir())
    assert len(figures) == len(FIGURES)
    drawn = ["".join(ElementTree.fromstring(path.read_bytes()).itertext()) for path in figures]
    assert sum("$x_1$" in text for text in drawn) >= 2  # a name is no formula
    for path in figures:
        assert "<script" not in path.read_text()
        ElementTree.fromstring(path.read_bytes())


def _replaced(value: Any, names: set[str], by: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, names, by) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, names, by) for item in value]
    return by if isinstance(value, str) and value in names else value


def test_folders_of_the_machine_are_not_shown(tmp_path: Path) -> None:
    settings = {"datasets": ["/home/someone/graph.npz", "cora"], "root": "/home/someone/data", "gone": None}
    content = all_sections()["accuracy"] | {"settings": settings}
    text = render(_write(tmp_path / "x", {"accuracy": content})).read_text()
    assert "graph.npz, cora" in text
    assert "someone" not in text
    assert "gone" not in text


def test_one_wide_interval_does_not_flatten_the_others() -> None:
    narrow = [{"mean": -0.002 * i, "low": -0.002 * i - 0.01, "high": -0.002 * i + 0.01} for i in range(9)]
    assert _reach([*narrow, {"mean": 0.0, "low": -0.9, "high": 0.9}]) == pytest.approx(_reach(narrow), rel=0.3)
    assert _reach([{"mean": 0.05, "low": None, "high": None}]) == pytest.approx(5.5)  # every mean is within


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{not json", "memory.json cannot be read"),
        ("[]", "memory.json is not what dibit reproduce memory writes: expected an object"),
        ('{"section": "blocks", "finished": true, "results": {}}', "memory.json holds the section 'blocks'"),
        ('{"section": "memory", "finished": true, "results": {"shapes": 3}}', "expected a list at results.shapes"),
    ],
)
def test_files_that_are_not_ours(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text(content)
    with pytest.raises(UserError) as error:
        render(tmp_path)
    assert sentence in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        render(tmp_path / "missing")


# ---- in a browser ----

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
MEASURE = """
const boxes = [...document.querySelectorAll('figure, table')].map(e => {
  const box = e.getBoundingClientRect();
  return [e.id, box.width, box.height, e.checkVisibility({checkVisibilityCSS: true, contentVisibilityAuto: true})];
});
const images = [...document.images].map(i => [i.complete, i.naturalWidth, i.currentSrc.slice(0, 26), i.currentSrc]);
const page = document.scrollingElement;
const requests = performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'));
return {boxes, images, requests, wide: [page.scrollWidth, page.clientWidth]};
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver is installed: the page is not looked at in a browser")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: no browser can be driven")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driven = webdriver.Chrome(options=options, service=Service(driver))
    yield driven
    driven.quit()


def _open(browser: Any, page: Path, width: int) -> dict[str, Any]:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    return browser.execute_script(MEASURE)


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(browser: Any, page: Path, width: int) -> None:
    found = _open(browser, page, width)
    shown = {name for name, wide, high, visible in found["boxes"] if wide > 0 and high > 0 and visible}
    assert shown == {f"fig-{n}" for n in FIGURES} | {f"tab-{n}" for n in TABLES}  # the folded ones are not open
    assert len(found["images"]) == len(FIGURES)
    assert all(complete and natural > 0 for complete, natural, _, _ in found["images"])
    assert {kind for _, _, kind, _ in found["images"]} == {"data:image/svg+xml;base64,"}
    natural = {width for _, width, _, _ in found["images"]}
    assert natural == ({358} if width == 390 else {800})  # the layout for this screen, in CSS pixels
    assert found["wide"][0] <= found["wide"][1]
    assert found["requests"] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "DEBUG"] == []


def test_folded_tables_open(browser: Any, page: Path) -> None:
    _open(browser, page, 390)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = browser.execute_script(MEASURE)
    shown = {name for name, wide, high, visible in found["boxes"] if wide > 0 and high > 0 and visible}
    assert {f"tab-{n}" for n in FOLDED} <= shown
    assert found["wide"][0] <= found["wide"][1]


def test_paper_shows_what_the_screen_folds(browser: Any, page: Path) -> None:
    _open(browser, page, 1280)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        found = browser.execute_script(MEASURE)
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    shown = {name for name, wide, high, visible in found["boxes"] if wide > 0 and high > 0 and visible}
    assert {f"tab-{n}" for n in FOLDED | TABLES} <= shown


@pytest.mark.parametrize("width", [390, 1280])
def test_odd_pages_in_a_browser(browser: Any, tmp_path: Path, width: int) -> None:
    """Long names with markup, and a page without any section: nothing runs, nothing is wider than the screen."""
    name = "<script>alert(1)</script>" + "x" * 80
    accuracy = _replaced(all_sections()["accuracy"], {"cora"}, name)
    for folder, sections in (("long", {"accuracy": accuracy}), ("none", {})):
        found = _open(browser, render(_write(tmp_path / folder, sections)), width)
        assert found["wide"][0] <= found["wide"][1]
        assert all(natural > 0 for _, natural, _, _ in found["images"])
        assert [entry for entry in browser.get_log("browser") if entry["level"] != "DEBUG"] == []


def test_text_in_figures_can_be_read_on_a_phone(browser: Any, page: Path) -> None:
    found = _open(browser, page, 390)
    sizes = set()
    for *_, source in found["images"]:
        svg = base64.b64decode(source.partition(",")[2]).decode()
        sizes |= {float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)}
    assert min(sizes) * 4 / 3 >= 10  # the SVG's units are points, and it is shown as large as it is drawn
