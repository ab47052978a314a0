"""If these fail, the report cannot be read, hides where its numbers come from, or runs what a stranger wrote."""

import copy
import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from torchreg.cli import main
from torchreg.plots import rendering
from torchreg.reporting.pages import escape_markdown, write_pages
from torchreg.reporting.tables import Entry, make_entry, make_table, proposal_table

from .synthetic import Campaign, Machine, report_of, without_noise

EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)> | `a` | **b** [c](https://evil.example) $d$ & é 中'
"""What somebody else may have named their machine."""

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


LARGE = Campaign(
    nodes=(1, 2), ranks_per_node=(1, 2, 4), num_features=(1,), combinations=(("sgd", "ddp"),),
    num_blocks=6, local_batch_sizes=(), machine=Machine(alpha_s=5e-6),  # so that the law of Amdahl holds
)  # fmt: skip
FEW = Campaign(
    ranks_per_node=(1, 2), num_features=(1,), combinations=(("manual", "mpi"),), num_blocks=3, campaign="few",
    global_batch_sizes=(), message_sizes=(),
)  # fmt: skip


TARGET_FIELDS = (
    "target_excess", "predicted_steps", "measured_steps", "measured_time_s", "stability_limit", "noise_floor",
)  # fmt: skip


def change(record):
    """Two nodes only with 4 ranks each; 8 ranks never reach their target; one launch failed."""
    launch, campaign = record["launch"], record["campaign"]["name"]
    if campaign == "few":
        record["dtype"] = "float32"  # not comparable
        for point in record["points"]:
            point |= dict.fromkeys(TARGET_FIELDS)
        failed = launch["block"] == 2 and launch["world_size"] == 2
        return FEW.failure(2, 1, 2, "mpiexec ended with exit status 6") if failed else record
    if launch["num_nodes"] == 2 and launch["ranks_per_node"] != 4:
        return None
    for point in record["points"]:
        if launch["world_size"] == 8:
            point |= dict.fromkeys(["predicted_steps", "measured_steps", "measured_time_s"])
            point["stability_limit"] = 0.5
    return record


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two groups, one with too few launches; within and across nodes; strings from records are hostile."""
    found = report_of(LARGE, FEW, change=change, folder=tmp_path_factory.mktemp("campaigns"))
    found["groups"][0] |= {"machine": EVIL, "title": EVIL}
    found["machines"] = [EVIL]
    found["failed"][0] |= {"reason": EVIL, "launch": EVIL}
    found["excluded"].append({"what": "record", "reason": EVIL, "file": EVIL, "is_wrong_result": False})
    found["provenance"]["same"][EVIL] = EVIL
    return found


@pytest.fixture
def empty(report):
    """A report whose launches all failed."""
    correct = {**report["verdict"]["correct"], "status": "unknown", "num_runs": 0, "num_failed": 9}
    nothing = {"groups": [], "sources": [], "data_from_utc": None, "data_to_utc": None, "excluded": []}
    provenance = {"same": {}, "differs": []}
    verdict = {"correct": correct, "headline": None, "slow_hosts": []}
    return copy.deepcopy(report) | nothing | {"verdict": verdict, "provenance": provenance}


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, write_pages(report, folder)


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
    assert {"figure-1-strong-within-a-node", "figure-2-weak-within-a-node"} <= pictures


def test_every_element_is_closed_and_every_id_is_unique(page):
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_every_link_leads_somewhere_in_the_page(page):
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [attributes["href"] for attributes in page.all("a")]
    assert len(links) > 10
    assert {link[:1] for link in links} == {"#"}
    assert {link[1:] for link in links} <= ids
    references = [value for _, attributes in page.elements for value in re.findall(r"url\(#([^)]+)\)", str(attributes))]
    assert set(references) <= ids
    assert {attributes["href"][1:] for attributes in page.all("use")} <= ids


def test_every_picture_is_in_the_page_and_says_what_it_shows(page):
    ids = {attributes["id"] for attributes in page.all("title") if "id" in attributes}
    pictures = [attributes for attributes in page.all("svg") if attributes.get("aria-hidden") != "true"]
    assert len(pictures) > 20
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


def test_strings_of_records_are_shown_and_never_obeyed(page):
    shown = "".join(page.text)
    assert shown.count(EVIL) >= 8
    assert any(EVIL in title for title in page.titles)


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
    expected, escaped = " ".join(text.split()), escape_markdown(text)
    for source in (f"| a | b |\n| --- | --- |\n| x | {escaped} |\n", f"- {escaped}\n"):
        tokens = MARKDOWN.parse(source)
        assert not [token for token in tokens if token.type in ("html_block", "heading_open", "fence", "hr")]
        inline = [token for token in tokens if token.type == "inline"]
        children = inline[-1].children or [] if expected else []
        assert {child.type for child in children} <= {"text", "text_special"}
        assert "".join(child.content for child in children).strip() == expected


def test_the_verdict_comes_before_everything_else(page):
    shown = "".join(page.text)
    order = [
        "trains correctly?✓ yes",
        "efficiency at 8 ranks",
        "fastest to target",
        "what limits",
        "Trains correctly. All ",
        "Strong scaling to 8 ranks: efficiency ",
        "What limits strong scaling at 8 ranks: ",
        "Fastest to 1 % above",
        "Caution: these numbers are of ",
    ]
    positions = [shown.index(part) for part in order]
    assert positions == sorted(positions)
    headings = [
        "Scaling limit and bottleneck",
        "Points",
        "Cost",
        "Provenance",
        "Failed and excluded",
        "How it was measured",
    ]
    positions = [shown.rindex(heading) for heading in headings]
    assert positions == sorted(positions)
    assert shown.rindex(order[-1]) < positions[0]


def test_the_first_screen_has_four_figures_six_sentences_at_most_and_one_picture(written, report):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    header = text[text.index("<header>") : text.index("</header>")]
    first = Page(header)
    assert len(first.all("strong")) == 4
    assert len(first.all("li")) - 4 - header[header.index("<figure") :].count("<li") <= 6
    assert [attributes["id"] for attributes in first.all("figure")] == ["figure-1-headline"]
    assert len([attributes for attributes in first.all("div") if attributes.get("class") == "panel"]) == 2
    strong = report["verdict"]["headline"]["strong"]["series"]
    (series,) = [one for one in report["groups"][0]["series"] if one["id"] == strong]
    assert f"{100 * series['points'][-1]['efficiency']['value']:.0f} %" in "".join(first.text)
    assert "figure-1-headline" in (written[0] / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("status", "shown"), [("no", "Does not train correctly"), ("unknown", "Correctness unknown")])
def test_a_wrong_result_comes_first(status, shown, empty, tmp_path):
    first = {"launch": "block-3", "optimizer": "sgd", "sync": "ddp", "num_features": 1, "world_size": 4}
    num_wrong = 2 * (status == "no")
    empty["verdict"]["correct"] |= {"status": status, "num_wrong": num_wrong, "first_wrong": first}
    write_pages(empty, tmp_path)
    html_page, markdown_page = ((tmp_path / f"report.{end}").read_text(encoding="utf-8") for end in ("html", "md"))
    assert f'class="verdict {status}"' in html_page
    if status == "no":
        assert "✗ no" in html_page
        assert ", 2 wrong" in html_page
    sentence = {"no": " miss the closed-form solution, the first in block-3 (sgd/ddp", "unknown": "No run was checked"}
    for page in (html_page[html_page.index("<h1>") :], markdown_page):
        assert page.index(shown) < page.index(sentence[status]) < page.index("9 launches failed: see below")


def test_sentences_are_there_once(page, markdown):
    for shown in ("".join(page.text), markdown):
        for kind in ("Strong", "Weak"):
            assert shown.count(f"{kind} scaling to ") == (kind == "Strong")
        # In the verdict, and with its setting and the next world size in the section on targets.
        assert shown.count("Fastest to 1 % above the optimum: ") == 1
        assert shown.count("Fastest to 1 % above the optimum (1 feature): ") == 1


def test_numbers_have_units_and_intervals_and_what_is_missing_has_a_reason(report, page, markdown):
    point = report["groups"][0]["points"][0]["step_time_s"]
    value, low, high = (1e3 * point[end] for end in ("value", "low", "high"))
    shown = "".join(page.text)
    assert f"{value:.3g} ms" in shown
    assert f"{low:.3g} – {high:.3g} ms" in shown
    assert f"{value:.3g} ms ({low:.3g} – {high:.3g} ms)" in markdown
    for text_ in (" ".join(shown.split()), " ".join(markdown.split())):
        assert "never reached where training diverges, or where its noise floor lies above the target" in text_
        assert "What a table has as – was not measured, or is not defined." in text_
        assert text_.count("never") > 3
        assert "s/byte" in text_
    assert "(constant global batch: ideal is p/p0 times the throughput), baseline p0 = 1. " in shown
    assert "not identifiable: " in shown
    assert "stable up to 4 ranks" in shown


def test_a_proposal_keeps_what_was_measured_apart_from_what_is_extrapolated(report, markdown):
    section = markdown[markdown.index("## For an allocation proposal") : markdown.index("## Cost")]
    (table,) = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    rows = [[entry.strip() for entry in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    (strong,) = [one for one in report["groups"][0]["series"] if one["scope"].startswith("across")]
    assert [row[1:3] for row in rows] == [["1", "4"], ["2", "8"]], "two world sizes determine no model"
    for row, point in zip(rows, strong["points"], strict=True):
        assert row[3].startswith(f"{1e6 * point['step_time_s']['value']:.3g} µs (")
        assert row[-1] == "measured, 6 launches"
    assert "Extrapolated, strong scaling: nothing, because the points determine no model." in section
    assert "was started by: mpiexec -n 8" in section


def test_a_proposal_goes_on_to_eight_times_the_largest_world_size_where_a_model_is_known(tmp_path):
    # 50 + 10 · 256/p + 100 · log₂ p µs: 2610 µs on one rank; 50 + 40 + 600 µs on 64, and 2610 / 690 / 64 = 5.91 %.
    machine = without_noise(Machine(beta_s_per_byte=1e-15))
    exact = replace(LARGE, machine=machine, nodes=(1,), ranks_per_node=(1, 2, 4, 8), message_sizes=())
    found = report_of(exact, folder=tmp_path)
    table = proposal_table(found["groups"][0], found["groups"][0]["series"][:1])
    assert [row[2].text for row in table.rows] == ["1", "2", "4", "8", "16", "32", "64"]
    assert [row[-1].text for row in table.rows] == ["measured, 6 launches"] * 4 + ["extrapolated"] * 3
    assert [row[1].text for row in table.rows] == ["1", "1", "1", "1", "2", "4", "8"], "nodes of 8 ranks"
    assert (table.rows[-1][3].text, table.rows[-1][4].text) == ("690 µs", "5.91 %")


def test_within_a_node_is_apart_from_across_nodes(page):
    ids = {attributes.get("id") for attributes in page.all("section")}
    for kind in ("strong", "breakdown", "models", "targets"):
        assert {f"group-1-{kind}-within-a-node", f"group-1-{kind}-across-nodes-4-ranks-a-node"} <= ids
    assert "group-2-weak-within-a-node" in ids
    assert not [anchor for anchor in ids if anchor and anchor.startswith("group-2") and "across" in anchor]


def test_long_tables_are_folded(page):
    scrolling = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    folded = [attributes for attributes in page.all("details") if attributes.get("class") == "long"]
    assert 0 < len(folded) < len(scrolling) == len(page.all("table"))
    assert [make_table("", ["n"], [{"n": "1"}] * number).is_long for number in (14, 15)] == [False, True]


def test_the_same_report_gives_the_same_bytes_and_is_left_as_it_is(report, tmp_path):
    small = copy.deepcopy(report)
    group = small["groups"][1]
    group["series"], group["allreduce"] = group["series"][:1], []
    small["groups"] = [group]
    weak = {"series": group["series"][0]["id"], "num_settings": 1}
    small["verdict"]["headline"] = {"group": group["id"], "strong": None, "weak": weak, "best": None}
    before, folders = copy.deepcopy(small), [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        paths = write_pages(small, folder)
        rendering._swatch.cache_clear()
    assert small == before
    for path in paths:
        assert path.read_bytes() == (folders[0] / path.name).read_bytes(), path.name


def test_a_report_of_nothing_is_a_page_too(empty, tmp_path):
    paths = write_pages(empty, tmp_path)
    assert [path.name for path in paths] == ["report.md", "report.html"]
    for path in paths:
        page = path.read_text(encoding="utf-8")
        assert "No launch left a valid record" in page
        assert "A launch is the unit of repetition" in page
        assert all(text in page for text in ("no series of world sizes", "no target was tried", "no step was divided"))
        assert "block-02-nodes-1-ranks-2" in page, "the failed launch"


def test_a_page_that_cannot_be_written_leaves_the_old_one(empty, tmp_path):
    (tmp_path / "report.html").write_text("old")
    del empty["cost"]
    with pytest.raises(UndefinedError, match="cost"):
        write_pages(empty, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_its_remedy(library, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["report", "campaign"]) == 2
    assert f"report needs {library}, which is not installed: pip install {library}" in capsys.readouterr().err


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

MEASURE = """<script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, width = page.documentElement.clientWidth;
    for (const one of page.querySelectorAll("details")) one.open = true;
    const wide = [...page.querySelectorAll("body *")].filter((one) =>
      one.getBoundingClientRect().right > width + 1 && !one.closest(".scroll") && !one.closest("svg"));
    return {width: frame.clientWidth, page: page.documentElement.scrollWidth, client: width,
            wide: wide.map((one) => one.tagName + "." + one.className),
            pictures: [...page.querySelectorAll(".panel svg")].map((one) => one.getBoundingClientRect().width),
            columns: [...page.querySelectorAll("td")].map((one) => one.getBoundingClientRect().width),
            first: page.querySelector("header .panels").getBoundingClientRect().bottom -
              page.querySelector("#verdict").getBoundingClientRect().top};
  });
  document.getElementById("found").textContent = JSON.stringify(found);
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="only a browser lays a page out: apt install chromium")
def test_a_browser_shows_it_on_a_phone_and_on_a_desktop_without_sideways_scrolling(written, tmp_path):
    text = html.escape((written[0] / "report.html").read_text(encoding="utf-8"))
    frames = "".join(f'<iframe style="width:{width}px;height:900px" srcdoc="{text}"></iframe>' for width in (375, 1280))
    harness = tmp_path / "harness.html"
    harness.write_text(
        f'<!doctype html><meta charset="utf-8">{frames}<pre id="found"></pre>{MEASURE}', encoding="utf-8"
    )
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", harness.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    for frame in found:
        assert frame["wide"] == []
        assert frame["page"] == frame["client"]
    phone, desktop = found
    assert min(phone["columns"]) > 120, "a column of a table can be read"
    assert desktop["first"] <= 850, "the first screen has the verdict and its picture"
    assert min(phone["pictures"]) > 250, "a panel fills the phone"
    assert min(desktop["pictures"]) > 250


def test_columns_with_the_same_value_in_every_row_move_to_the_title():
    names = ("a", "b", "c")

    def found(*rows):
        table = make_table(
            "Times", names, [dict(zip(names, row, strict=True)) for row in rows], ("a", "c"),
        )  # fmt: skip
        return table.title, table.columns, [[entry.text for entry in row] for row in table.rows]

    assert found("116", "126") == ("Times: a 1, c 6", ["b"], [["1"], ["2"]])
    assert found("116", "226") == ("Times: c 6", ["a", "b"], [["1", "1"], ["2", "2"]])
    assert found("116") == ("Times", [*names], [["1", "1", "6"]]), "a single row would lose everything"


def test_steps_to_a_target_have_every_digit():
    # Three digits would make 2,350 of 2,347.
    steps = {"value": 2346.6, "low": 2345.0, "high": 2348.5, "num_launches": 6}
    assert make_entry(steps, "whole") == Entry("2,347", "2,345 – 2,348")


def test_a_column_without_numbers_is_not_shown():
    rows = [{"step_time_s": 1.0, "karp_flatt": None, "a": "x"}, {"step_time_s": 2.0, "karp_flatt": None, "a": None}]
    table = make_table("Times", ["step time", "Karp–Flatt", "a"], rows)
    assert table.columns == ["step time", "a"]
    assert [[entry.text for entry in row] for row in table.rows] == [["1 s", "x"], ["2 s", "–"]]
