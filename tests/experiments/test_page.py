"""report.html: one file that needs nothing else, seen in a real browser where one is installed."""

import html
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import made_results as made
from browser import BROWSER, FLAGS
from lore.experiments.report import tables as reports

HOSTILE = "</script><script>alert(1)</script> & <b>\"bold\" 'x'</b>"


def page(folder: Path, results: dict[str, Any]) -> str:
    """The report of made-up results, without plots in files of their own, which take longer."""
    with mock.patch.object(reports, "write_plots", lambda *_: []):
        reports.report(made.write(results, folder))
    return (folder / "report.html").read_text()


def tags(text: str) -> list[tuple[str, dict[str, str | None]]]:
    """What stands in a page, tag by tag."""
    found, reader = [], HTMLParser()
    reader.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    reader.feed(text)
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that a report can show, and a name that means harm."""
    labels = {**made.LABELS, f"toy {HOSTILE}": ("toy", True, {}, made.LABELS["LoRe K=5"][3])}
    folder, results = tmp_path_factory.mktemp("report"), made.results(labels, seeds=2)
    results["settings"]["warning"] = HOSTILE
    results["seeds"][0]["facts"] = {"personal": "score test: p = 0.2"}
    text = {"prompt": "Why? " * 100, "response": HOSTILE}
    fit = results["seeds"][0]["methods"]["lore"]["fits"][-1]
    fit["likes"] = [{"direction": "1", "most": [text], "least": [text, text]}]
    results["seeds"][0]["users"]["seen"][0] = results["seeds"][1]["users"]["seen"][0] = HOSTILE
    page(folder, results)
    return folder / "report.html"


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing_that_was_written(report):
    text = report.read_text()
    for tag, attributes in tags(text):
        assert tag not in ("link", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/svg+xml;base64,")), value
    assert "default-src 'none'" in text
    # all that was written is escaped
    assert HOSTILE not in text and text.count("<script>") == 1
    escaped = html.escape(HOSTILE).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
    assert text.count(escaped) > 5


def test_the_verdict_comes_first_and_tables_say_what_the_text_says(report):
    text = report.read_text()
    parts = re.findall("<h2>(.*)</h2>", text)
    assert parts[:4] == ["Verdict", "Accuracy and log loss", "Tables", "What was learned"]
    assert parts[4:] == ["What LoRe K=5 likes", "Users"]
    assert text.count('class="card better"') == 4 and "score test: p = 0.2" in text
    found = [tag for tag, _ in tags(text)]
    assert found.count("table") == 6 and found.count("img") == 4 + 2 + 2
    assert text.count("Liked most") == 1 and "Why? …" in text
    markdown = (report.parent / "table.md").read_text()
    cells = re.findall(r"\| +([^|]*\[[^|]*\]) +(?=\|)", markdown)
    assert len(cells) > 60 and all(f"<td>{cell.strip()}</td>" in text for cell in cells)


def test_users_are_listed_with_their_accuracy_under_each_method(report):
    text = report.read_text()
    table = text[text.index("<h2>Users") :]
    row = table[table.index("seen-7</th>") :].split("</tr>")[0]
    accuracy: dict[str, list[float]] = {}
    for r in made.records(json.loads((report.parent / "results.json").read_text())):
        if r["set"] == "seen" and not r["control"] and r["label"] != "LoRe K=2":
            accuracy.setdefault(r["label"], []).append(r["accuracy"][7])
    expected = ["seen", *(f"{50 * (first + second):.1f}" for first, second in accuracy.values())]
    assert re.findall("<td>(.*)</td>", row) == expected and len(expected) == 7


@pytest.mark.slow
def test_a_page_is_the_same_whenever_it_is_made_and_says_where_nothing_is_personal(tmp_path):
    results = made.results({"BT": made.LABELS["BT"]}, sweep=True)
    text = page(tmp_path, results)
    assert "No personal method was fitted" in text and page(tmp_path, results) == text


# -------------------------------------------------------------------- A browser


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_the_page_within_its_width_and_sorts_its_tables(report, tmp_path, width):
    script = """<script>addEventListener("load", () => {
      const table = document.querySelector("table"), column = table.tHead.rows[0].cells[1];
      const read = () => [...table.tBodies[0].rows].map(row => row.cells[1].textContent).join("|");
      const orders = [read()];
      for (let i = 0; i < 3; i++) { column.firstElementChild.click(); orders.push(read()); }
      const {scrollWidth, clientWidth} = document.documentElement;
      const drawn = [...document.images].map(image => image.naturalWidth);
      parent.postMessage({scrollWidth, clientWidth, drawn, orders}, "*");
    });</script>"""
    inner, outer = tmp_path / "inner.html", tmp_path / "outer.html"
    inner.write_text(report.read_text().replace("</body>", script + "</body>"))
    outer.write_text(
        f"<iframe src='inner.html' style='width:{width}px;height:800px;border:0'></iframe>"
        "<pre></pre><script>addEventListener('message', event => {"
        "document.querySelector('pre').textContent = JSON.stringify(event.data)})</script>"
    )
    flags = "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom"
    where = f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width + 100},900"
    command = [BROWSER, *FLAGS, *flags, *where, f"file://{outer}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(html.unescape(re.search("<pre>(.*?)</pre>", done.stdout, re.DOTALL)[1]))
    assert len(said["drawn"]) == 8 and min(said["drawn"]) > 100
    assert said["scrollWidth"] == said["clientWidth"] >= width - 20  # nothing sticks out
    first, falling, rising, again = (
        [float(cell.split()[0]) if cell else "" for cell in order.split("|")]
        for order in said["orders"]
    )
    figures, blank = sorted(x for x in first if x != ""), [""] * first.count("")
    assert blank and again == first != falling  # blank cells stay below all figures
    assert (falling, rising) == (figures[::-1] + blank, figures + blank)
