"""The page: rendered from whole, partial and odd sections, and looked at in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dibit.reproduce.charts import COLORS
from dibit.reproduce.report import render
from dibit.reproduce.sections import SECTIONS
from dibit.reproduce.views import VIEWS
from dibit.tools.errors import UserError
from dibit.tools.number_format import points, slug
from tests.reproduce.examples import all_sections, section

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("error:.*layout not applied", "error:Glyph")

FIGURES = {
    *("memory-arxiv", "memory-flickr", "blocks", "variance-amazon-computers-sage-60", "accuracy", "tuned"),
    *(f"distribution-amazon-computers-sage-{setting}" for setting in ("exact", "i-exact", "no-projection")),
}
TABLES = [  # how their captions begin
    *(
        "Saved MB (2²⁰ bytes) on the arxiv shape",
        "Saved MB (2²⁰ bytes) on the flickr shape",
        "Saved MB and seconds a step",
    ),
    *("Blocks on amazon-computers", "Blocks on cora", "Expected variance", "Variance of stochastic rounding on real"),
    *["Jensen-Shannon divergence"] * 2,
    *("Test accuracy (mean", "The papers’ accuracies", "Test accuracy at the best", "When, where and with what"),
]


def _write(folder: Path, sections: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in sections.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def _figures(page: str) -> set[str]:
    return set(re.findall('id="fig-([^"]+)"', page))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(_write(tmp_path_factory.mktemp("study"), all_sections()))


@pytest.mark.slow
def test_every_figure_and_table(page: Path) -> None:
    text = page.read_text()
    assert _figures(text) == FIGURES
    captions = re.findall('<p><strong>([^<]*)</strong></p>\n<div class="scroll"', text)
    assert len(captions) == text.count("<table>") == len(TABLES)
    assert all(caption.startswith(begin) for caption, begin in zip(captions, TABLES, strict=True))
    files = {path.stem for path in (page.parent / "figures").iterdir()}
    assert files == FIGURES
    for path in (page.parent / "figures").iterdir():
        assert ElementTree.fromstring(path.read_bytes()).tag.endswith("svg")


@pytest.mark.slow
def test_it_holds_everything_itself(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"(?:src|srcset)=\"(?!data:)", text) == []
    assert re.findall(r"url\((?!#)", text) == []
    assert "<script" not in text
    assert "@import" not in text
    assert re.findall(r'href="(?!#|data:,|https://arxiv\.org/)', text) == []


def test_figures_have_descriptions_with_numbers(page: Path) -> None:
    alts = [html.unescape(alt) for alt in re.findall(r'role="img"[^>]* aria-label="([^"]*)"', page.read_text())]
    assert len(alts) == len(FIGURES)
    assert all(len(re.findall(r"\d\.\d", alt)) > 5 for alt in alts)


def test_remembered_numbers_are_marked_in_words_and_to_the_eye(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"<td[^>]*>[^\n]*71\.95[^\n]*</td>", text) == [
        '<td style="text-align:right"><em>71.95 ± 0.16 †</em></td>'
    ]
    assert text.count("71.95 ±") == 1
    assert "Remembered, not confirmed" in text
    assert "(remembered, not confirmed)" in text


@pytest.mark.slow
def test_the_same_files_give_the_same_bytes(page: Path, tmp_path: Path) -> None:
    again = render(_write(tmp_path / "again", all_sections()))
    assert again.read_bytes() == page.read_bytes()
    assert (again.parent / "report.md").read_bytes() == (page.parent / "report.md").read_bytes()
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
        assert "font-size: 8px" in text
        assert "77px" not in text
    finally:
        mpl.rcdefaults()


def _parameters(mpl: Any) -> dict[str, Any]:
    """matplotlib's parameters without the backend, which is chosen when it is looked at."""
    return {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.slow
def test_sections_that_have_not_been_run_are_named(name: str, tmp_path: Path) -> None:
    results = all_sections()[name]
    text = render(_write(tmp_path / "one", {name: results})).read_text()
    assert [n for n in SECTIONS if f"<code>dibit reproduce {n} --out DIR</code></li>" in text] == [
        n for n in SECTIONS if n != name
    ]
    sections = [name for name in re.findall('<h2 id="([^"]*)"', text) if name not in ("summary", "sources")]
    assert sections == [slug(VIEWS[name].TITLE), "machine-and-versions"]


def test_no_section_at_all(tmp_path: Path) -> None:
    text = render(_write(tmp_path / "none", {})).read_text()
    assert "Nothing has been measured yet." in text
    assert text.count("<li>", text.index("Not run yet:"), text.index('<h2 id="sources"')) == len(SECTIONS)


def test_the_results_of_this_repository(tmp_path: Path) -> None:
    shutil.copy(ROOT / "benchmarks" / "tuned" / "tuned.json", tmp_path)
    text = render(tmp_path).read_text()
    assert "amazon-computers-sage, 4 × 64, norm layer, 1000 epochs" in text
    together = json.loads((tmp_path / "tuned.json").read_text())["results"]["together"]["default"]
    mean, low, high = (points(together[name]) for name in ("mean", "low", "high"))
    assert f"<strong>{mean}</strong> (95 % interval {low} to {high}, mean of {together['cells']} cells)" in text
    assert _figures(text) == {"tuned"}


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
    assert len(_figures(text)) == 7
    assert "(model)" in text


def test_panels_that_hold_nothing_are_left_out(tmp_path: Path) -> None:
    accuracy = all_sections()["accuracy"]
    accuracy["results"]["rows"] = accuracy["results"]["rows"][:1]  # plain FP32 alone: no difference yet
    text = render(_write(tmp_path / "x", {"accuracy": accuracy})).read_text()
    assert "Test accuracy, %: cora, sage; FP32 81.03." in text
    assert "Test accuracy minus FP32" not in text


def test_a_figure_that_holds_nothing_is_left_out(tmp_path: Path) -> None:
    blocks = all_sections()["blocks"]
    graphs = [graph | {"rows": graph["rows"][:1]} for graph in blocks["results"]["graphs"]]  # plain FP32 alone
    blocks["results"] |= {"timing": None, "graphs": graphs}
    text = render(_write(tmp_path / "x", {"blocks": blocks})).read_text()
    assert _figures(text) == set()
    assert "Blocks on cora" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.slow
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
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; '&quot;'" in text
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


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{not json", "memory.json cannot be read"),
        ("[]", "memory.json is not what dibit reproduce memory writes: expected a valid dictionary"),
        ('{"section": "blocks", "finished": true, "results": {}}', "memory.json holds the section 'blocks'"),
        (
            '{"section": "memory", "finished": true, "results": {"shapes": 3}}',
            "expected a valid list at results.shapes, got 3; move it away, and dibit reproduce memory writes it again",
        ),
        ('{"section": "memory", "results": {"shapes": []}}', "expected a value at finished; move it away"),
        ('{"section": "memory", "finished": "yes", "results": {}}', "expected a valid boolean at finished, got 'yes'"),
    ],
)
def test_files_that_are_not_ours(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text(content)
    with pytest.raises(UserError) as error:
        render(tmp_path)
    assert sentence in str(error.value)
    assert str(tmp_path / "memory.json") in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]
    assert (tmp_path / "memory.json").read_text() == content


@pytest.mark.parametrize(
    ("section", "change", "place"),
    [
        ("memory", lambda r: r["shapes"][1]["rows"][2]["by_kind"].update(ReLU="12"), "shapes[1].rows[2].by_kind.ReLU"),
        ("memory", lambda r: r["shapes"][0].update(nodes=1.5), "shapes[0].nodes"),
        ("memory", lambda r: r["shapes"][0].update(nodes=True), "shapes[0].nodes"),
        ("blocks", lambda r: r["graphs"][0]["rows"][1]["gradient_error"].update({"0": []}), "graphs[0].rows[1]"),
        ("variance", lambda r: r["measured"][0]["rows"][3].pop("normal"), "measured[0].rows[3].normal"),
        ("distribution", lambda r: r["graphs"][0]["rows"][0].update(holds="no"), "graphs[0].rows[0].holds"),
        ("accuracy", lambda r: r["rows"][0].update(test=None), "rows[0].test"),
        ("tuned", lambda r: r["together"]["default"].pop("low"), "together.default.low"),
    ],
)
def test_a_damaged_field_is_named(section: str, change: Any, place: str, tmp_path: Path) -> None:
    content = all_sections()[section]
    change(content["results"])
    with pytest.raises(UserError) as error:
        render(_write(tmp_path / "x", {section: content}))
    assert f"/{section}.json is not what dibit reproduce {section} writes: expected" in str(error.value)
    assert f" at results.{place}" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_newer_version_adds_is_let_through(tmp_path: Path) -> None:
    content = all_sections()["memory"] | {"new": 1}
    content["results"]["shapes"][0]["rows"][0]["new"] = {"x": []}
    from dibit.reproduce.sections import read

    assert read(_write(tmp_path / "x", {"memory": content})) == {"memory": content}


def _luminance(color: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: list[float], b: list[float]) -> float:
    """As WCAG 2 defines it."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", COLORS)
def test_colours_can_be_seen_on_white_and_on_black(name: str) -> None:
    def rgb(color: str) -> list[float]:
        return [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]

    # the filter of dark pages: inverted, then the hue turned by 180 degrees, with the matrix of the CSS specification
    turn = [[-0.574, 1.43, 0.144], [0.426, 0.43, 0.144], [0.426, 1.43, -0.856]]
    inverted = [1 - c for c in rgb(COLORS[name])]
    dark = [min(1.0, max(0.0, sum(a * b for a, b in zip(row, inverted, strict=True)))) for row in turn]
    assert _contrast(rgb(COLORS[name]), rgb("#ffffff")) > 2.4
    assert _contrast(dark, rgb("#14181d")) > 2.4


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        render(tmp_path / "missing")


# ---- in a browser ----

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
DRAWN = "requestAnimationFrame(() => requestAnimationFrame(arguments[arguments.length - 1]))"  # all of it
MEASURE = """
const boxes = [...document.querySelectorAll('[role=img], table')].map(e => {
  const box = e.getBoundingClientRect();
  return [e.id, box.width, box.height, e.checkVisibility({checkVisibilityCSS: true, contentVisibilityAuto: true})];
});
const panels = [...document.querySelectorAll('[role=img] > svg')].map(svg => {
  const inside = [...svg.querySelectorAll('text')].map(text => {
    const box = text.getBoundingClientRect();
    return [text.textContent, box.left, box.right, box.top, box.bottom,
            parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a];
  });
  const box = svg.getBoundingClientRect();
  return [svg.parentElement.id, box.left, box.right, inside, getComputedStyle(svg).filter];
});
const page = document.scrollingElement;
const requests = performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'));
return {boxes, panels, requests, wide: [page.scrollWidth, page.clientWidth]};
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
    browser.execute_async_script(DRAWN)
    return browser.execute_script(MEASURE)


@pytest.mark.parametrize("width", [358, 390, 1280])
@pytest.mark.slow
def test_in_a_browser(browser: Any, page: Path, width: int) -> None:
    found = _open(browser, page, width)
    shown = [name for name, wide, high, visible in found["boxes"] if wide > 0 and high > 0 and visible]
    assert sorted(shown) == [*[""] * len(TABLES), *sorted(f"fig-{name}" for name in FIGURES)]
    assert {name for name, *_ in found["panels"]} == {f"fig-{name}" for name in FIGURES}
    assert all(0 <= left < right <= width for _, left, right, *_ in found["panels"])
    assert found["wide"][0] <= found["wide"][1]
    assert found["requests"] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "DEBUG"] == []


@pytest.mark.parametrize("width", [358, 390, 1280])
def test_text_in_figures_can_be_read(browser: Any, page: Path, width: int) -> None:
    for name, left, right, texts, _ in _open(browser, page, width)["panels"]:
        texts = [text for text in texts if text[0].strip()]
        assert texts
        for i, (text, start, end, top, bottom, size) in enumerate(texts):
            assert size >= 9.9, f"{text} in {name} is {size:.1f} pixels high"
            assert left - 1 <= start < end <= right + 1, f"{text} in {name} is cut"
            for other, other_start, other_end, other_top, other_bottom, _ in texts[:i]:
                across = min(end, other_end) - max(start, other_start)
                down = min(bottom, other_bottom) - max(top, other_top)
                assert across < 1 or down < 0.4 * size, f"{text} lies on {other} in {name}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_mode(browser: Any, page: Path, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        filters = {filter for *_, filter in _open(browser, page, 1280)["panels"]}
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    dark = ({"invert(1) hue-rotate(180deg)"}, "rgb(20, 24, 29)")
    assert (filters, paper) == (dark if scheme == "dark" else ({"none"}, "rgb(255, 255, 255)"))


@pytest.mark.parametrize("width", [390, 1280])
def test_odd_pages_in_a_browser(browser: Any, tmp_path: Path, width: int) -> None:
    """Long names with markup, and a page without any section: nothing runs, nothing is wider than the screen."""
    name = "<script>alert(1)</script>" + "x" * 80
    accuracy = _replaced(all_sections()["accuracy"], {"cora"}, name)
    for folder, sections in (("long", {"accuracy": accuracy}), ("none", {})):
        found = _open(browser, render(_write(tmp_path / folder, sections)), width)
        assert found["wide"][0] <= found["wide"][1]
        assert all(left < right for _, left, right, *_ in found["panels"])
        assert [entry for entry in browser.get_log("browser") if entry["level"] != "DEBUG"] == []
