"""If these fail, the report cannot be read, hides where its numbers come from, or runs what a stranger wrote."""

import copy
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests.report.example import make_report
from torchreg.plots import rendering
from torchreg.reporting import pages
from torchreg.reporting.page_parts import Cell, counted_estimate, table
from torchreg.reporting.pages import write_pages
from torchreg.reporting.sections import sections_of

EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)> | `a` | **b** [c](https://evil.example) $d$ & é 中'
"""What a stranger may have called their machine."""

MARKDOWN = MarkdownIt("commonmark").enable("table").enable("strikethrough")


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, text, and what opens without closing."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open, self.titles, self.rows = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += 1

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "title":
            self.titles.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def hostile_report():
    """Two groups, one with too few launches; strings from elsewhere are hostile; within and across nodes."""
    report = make_report(num_features=(1,), ranks_per_node=(1, 4), combinations=("manual/mpi", "sgd/ddp"), machine=EVIL)
    few = make_report(
        num_features=(1,), num_nodes=(1,), ranks_per_node=(1, 2), combinations=("manual/mpi",), num_launches=3
    )
    few["groups"][0]["id"] = "g2"
    report["groups"] += few["groups"]
    report["title"] = EVIL
    report["verdict"]["lines"].append(EVIL)
    report["verdict"]["correct"]["text"] = EVIL
    report["failed"][0] |= {"reason": EVIL, "launch": EVIL}
    report["excluded"][0] |= {"reason": EVIL, "file": EVIL}
    report["provenance"]["same"][EVIL] = {"host": EVIL}
    report["method"].append(EVIL)
    return report


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, write_pages(hostile_report(), folder)


@pytest.fixture(scope="module")
def page(written):
    return Page((written[0] / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def markdown(written):
    return (written[0] / "report.md").read_text(encoding="utf-8")


def test_all_files_are_there_whole_and_the_pages_come_last(written):
    folder, paths = written
    assert sorted(paths) == sorted(folder.iterdir())
    assert [path.name for path in paths[-2:]] == ["report.md", "report.html"]
    pictures = {path.stem for path in paths[:-2]}
    assert {f"{name}{kind}" for name in pictures for kind in (".png", ".svg")} == {path.name for path in paths[:-2]}
    assert "figure-1-strong-within-a-node" in pictures


def test_every_element_is_closed_and_every_id_is_unique(page):
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_every_link_leads_somewhere_in_the_page(page):
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [attributes["href"] for attributes in page.all("a")]
    assert len(links) > 20
    assert {link[:1] for link in links} == {"#"}
    assert {link[1:] for link in links} <= ids
    references = [value for _, attributes in page.elements for value in re.findall(r"url\(#([^)]+)\)", str(attributes))]
    assert set(references) <= ids
    assert {attributes["href"][1:] for attributes in page.all("use")} <= ids


def test_every_picture_is_in_the_page_and_says_what_it_shows(page):
    ids = {attributes["id"] for attributes in page.all("title") if "id" in attributes}
    pictures = [attributes for attributes in page.all("svg") if attributes.get("aria-hidden") != "true"]
    assert len(pictures) > 30
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert attributes["aria-labelledby"] in ids
    assert all(title.strip() for title in page.titles)
    assert len(page.titles) == len(pictures) + 1
    assert not page.all("img")
    assert len(page.all("figcaption")) == len(page.all("figure")) > 10


def test_nothing_comes_from_the_network_and_nothing_runs(page, written):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    for tag in ("script", "img", "iframe", "object", "embed", "base", "form"):
        assert not page.all(tag), tag
    assert page.all("link") == [{"rel": "icon", "href": "data:,"}]
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"@import|url\(|expression", style)
    assert set(re.findall(r"https?://[^\s\"<]+", text)) == {"http://www.w3.org/2000/svg", "https://evil.example)"}


def test_what_strangers_wrote_is_shown_as_they_wrote_it(page):
    shown = "".join(page.text)
    assert shown.count(EVIL) >= 8
    assert EVIL in page.titles


def test_in_markdown_too(markdown):
    def walk(tokens):
        for token in tokens:
            yield token
            yield from walk(token.children or [])

    tokens = list(walk(MARKDOWN.parse(markdown)))
    kinds = {token.type for token in tokens}
    assert not kinds & {"link_open", "code_inline", "em_open", "fence", "code_block", "hr"}
    allowed = r"</?(details|summary|sup)>"
    for token in tokens:
        if token.type in ("html_inline", "html_block"):
            assert not re.search(r"<(?!/?(details|summary|sup)>)", token.content), token.content
            assert re.search(allowed, token.content)
    texts = [token.content for token in tokens if token.type == "inline"]
    assert len(texts) > 100
    shown = ["".join(child.content for child in token.children or []) for token in tokens if token.type == "inline"]
    assert sum(EVIL in text for text in shown) >= 8


def test_markdown_tables_keep_their_columns(markdown):
    tables = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)
    assert len(tables) > 10
    for written in tables:
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in written.splitlines()}
        assert len(bars) == 1, written
    assert len(re.findall("<table>", MARKDOWN.render(markdown))) == len(tables)


def test_markdown_pictures_are_files_beside_it(markdown, written):
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown)
    assert len(named) > 10
    assert {f"{Path(name).stem}.svg" for name in named} == {path.name for path in written[1] if path.suffix == ".svg"}


@settings(max_examples=400)
@given(st.text(alphabet=st.one_of(st.sampled_from("|`*_[]()<>&~#+-.!\\$:/@ 1\n\t"), st.characters()), min_size=1))
def test_markdown_shows_any_text_as_it_is(text):
    text = re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "", text)  # a parser may drop or replace these
    expected = " ".join(text.split())
    for source in (
        f"| a | b |\n| --- | --- |\n| x | {pages._in_markdown(text)} |\n",
        f"- {pages._in_markdown(text)}\n",
    ):
        tokens = MARKDOWN.parse(source)
        assert not [token for token in tokens if token.type in ("html_block", "heading_open", "fence", "hr")]
        inline = [token for token in tokens if token.type == "inline"]
        children = inline[-1].children or [] if expected else []
        assert {child.type for child in children} <= {"text", "text_special"}
        assert "".join(child.content for child in children).strip() == expected


def test_the_verdict_comes_before_everything_else(page):
    shown = "".join(page.text)
    order = ["trains correctly", "gains nothing from a second rank", "How far each series scales", "Points"]
    placements = [shown.index(text) for text in order[:2]] + [shown.rindex(text) for text in order[2:3]]
    assert placements == sorted(placements)
    headings = ["Cost", "Provenance", "Failed and left out", "How it was measured"]
    placements = [shown.rindex(heading) for heading in headings]
    assert placements == sorted(placements)


@pytest.mark.parametrize(("status", "told"), [("no", "does not train correctly"), ("unknown", "not known to train")])
def test_a_wrong_result_is_told_first(status, told, tmp_path):
    report = {**hostile_report(), "groups": []}
    report["verdict"]["correct"] = {"status": status, "text": "1 of 9 checks failed"}
    write_pages(report, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f'class="verdict {status}"' in text
    body = text[text.index("<h1>") :]
    assert body.index(told) < body.index("1 of 9 checks failed") < body.index("gains nothing")
    assert f"**{told}" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_nothing_in_the_verdict_is_said_twice(tmp_path):
    report = {**make_report(num_features=(1,)), "groups": []}
    report["verdict"] |= {"lines": ["All is well.", "Soonest is 4 ranks."], "fastest": {"text": "Soonest is 4 ranks."}}
    report["verdict"]["correct"] = {"status": "yes", "text": "All is well."}
    write_pages(report, tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.count("All is well.") == text.count("Soonest is 4 ranks.") == 1


def test_the_verdict_is_told_machine_by_machine():
    report = make_report(num_features=(1,), num_nodes=(1,), machine="polaris")
    report["verdict"] |= {"lines": ["polaris: Up to 4 ranks.", "polaris: Soonest is 4.", "Of all: nothing."]}
    report["verdict"] |= {"fastest": {"text": "Soonest is 4."}, "lowest_node_hours": None}
    assert pages._verdict_lines(report) == {"": ["Of all: nothing."], "polaris": ["Up to 4 ranks.", "Soonest is 4."]}


def test_numbers_have_units_and_intervals_and_what_is_missing_says_why(page, markdown):
    point = next(p for p in hostile_report()["groups"][0]["points"] if p["id"] == "sgd-ddp-1-256-nodes-2-ranks-8")
    # 2·10⁻⁴ + 4·10⁻⁸·32 + 1.1·10⁻⁵ + 9·(6·10⁻⁴ + 2·10⁻⁹·16) = 5.6126 ms, ± 2 %
    assert point["step_time_s"]["value"] == pytest.approx(5.6126e-3, rel=1e-4)
    shown = "".join(page.text)
    assert "5.61 ms" in shown
    assert "5.5 – 5.72 ms" in shown
    assert "5.61 ms (5.5 – 5.72 ms)" in markdown
    for text in (shown, markdown):
        assert "too few launches for a 95 % interval: it needs 6" in text
        assert "never: training diverges or its noise floor lies above the target" in text
        assert "not measured, or without meaning at this point" in text
        assert "ns/byte" in text
    assert "not identifiable: 2 world sizes do not determine 3 parameters: measure more" in shown


def test_within_a_node_is_apart_from_across_nodes(page):
    ids = {attributes.get("id") for attributes in page.all("section")}
    for kind in ("strong", "weak", "breakdown", "models", "targets"):
        assert {f"group-1-{kind}-within-a-node", f"group-1-{kind}-across-nodes-4-ranks-a-node"} <= ids
    assert not [anchor for anchor in ids if anchor and anchor.startswith("group-2") and "across" in anchor]


def test_long_tables_wait_behind_their_title(page):
    def tables_of(sections):
        for section in sections:
            yield from section.tables
            yield from tables_of(section.sections)

    tables = list(tables_of(sections_of(hostile_report())))
    long = [table for table in tables if len(table.rows) > 14]
    assert 0 < len(long) < len(tables)
    assert len(page.all("details")) == len(long)
    scrolling = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    assert len(scrolling) == len(page.all("table")) == len(tables)


def test_the_same_report_gives_the_same_bytes_and_is_left_as_it_is(tmp_path):
    report = make_report(num_features=(1,), num_nodes=(1,), ranks_per_node=(1, 2), combinations=("sgd/ddp",))
    report["groups"][0]["series"] = [one for one in report["groups"][0]["series"] if one["kind"] == "strong"]
    report["groups"][0]["targets"] = []
    before, folders = copy.deepcopy(report), [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        paths = write_pages(report, folder)
        rendering._swatch.cache_clear()
    assert report == before
    for path in paths:
        assert path.read_bytes() == (folders[0] / path.name).read_bytes(), path.name


def test_a_report_of_nothing_is_a_page_too(tmp_path):
    report = make_report(num_features=(1,)) | {
        "groups": [], "sources": [], "data_from_utc": None, "data_to_utc": None, "method": [], "excluded": [],
        "provenance": {"same": {}, "differs": []},
    }  # fmt: skip
    report["verdict"] = {
        "correct": {"status": "unknown", "text": "No launch went well."}, "lines": [], "scaling": [], "bound_by": [],
        "fastest": None, "lowest_node_hours": None,
    }  # fmt: skip
    paths = write_pages(report, tmp_path)
    assert [path.name for path in paths] == ["report.md", "report.html"]
    for path in paths:
        assert "No launch left a valid record" in path.read_text(encoding="utf-8")
        assert "mpiexec ended with exit status 6" in path.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(pages, "_pictures", lambda sections: [])
    report = {**make_report(num_features=(1,)), "groups": []}
    del report["cost"]
    with pytest.raises(KeyError):
        write_pages(report, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_its_remedy(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"{library}, which is not installed: pip install {library}"):
        write_pages({}, tmp_path)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

MEASURE = """<script>
onload = () => {
  const told = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, width = page.documentElement.clientWidth;
    for (const one of page.querySelectorAll("details")) one.open = true;
    const wide = [...page.querySelectorAll("body *")].filter((one) =>
      one.getBoundingClientRect().right > width + 1 && !one.closest(".scroll") && !one.closest("svg"));
    return {width: frame.clientWidth, page: page.documentElement.scrollWidth, client: width,
            wide: wide.map((one) => one.tagName + "." + one.className),
            pictures: [...page.querySelectorAll(".panel svg")].map((one) => one.getBoundingClientRect().width),
            table: [...page.querySelectorAll(".scroll")].some((one) => one.scrollWidth > one.clientWidth)};
  });
  document.getElementById("told").textContent = JSON.stringify(told);
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="only a browser lays a page out, and none is here: apt install chromium")
def test_a_browser_shows_it_on_a_phone_and_on_a_desktop_without_sideways_scrolling(written, tmp_path):
    text = html.escape((written[0] / "report.html").read_text(encoding="utf-8"))
    frames = "".join(f'<iframe style="width:{width}px;height:900px" srcdoc="{text}"></iframe>' for width in (375, 1280))
    harness = tmp_path / "harness.html"
    harness.write_text(f'<!doctype html><meta charset="utf-8">{frames}<pre id="told"></pre>{MEASURE}', encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", harness.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    told = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    for frame in told:
        assert frame["wide"] == []
        assert frame["page"] == frame["client"]
    phone, desktop = told
    assert phone["table"], "tables scroll by themselves"
    assert min(phone["pictures"]) > 250, "a panel fills the phone"
    assert min(desktop["pictures"]) > 250


def test_columns_that_say_the_same_in_every_row_are_told_once_in_the_title():
    columns = ("nodes", "ranks", "batch")

    def told(*rows):
        found = table("Times", columns, [tuple(map(Cell, row)) for row in rows], ("nodes", "batch"))
        return found.title, found.columns, [[cell.text for cell in row] for row in found.rows]

    assert told("116", "126") == ("Times: nodes 1, batch 6", ("ranks",), [["1"], ["2"]])
    assert told("116", "226") == ("Times: batch 6", ("nodes", "ranks"), [["1", "1"], ["2", "2"]])
    assert told("116") == ("Times", columns, [["1", "1", "6"]]), "a single row would lose all that it says"


def test_steps_to_a_target_are_told_to_the_last_digit():
    # Three digits would make 2,350 of what theory says is 2,347.
    estimate = {"value": 2346.6, "low": 2345.0, "high": 2348.5, "num_launches": 6}
    assert counted_estimate(estimate) == Cell("2,347", "2,345 – 2,348")
