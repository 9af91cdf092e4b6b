"""The page of a recipe, read as text: what it says, and that it reaches for nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from megacpp_nemo.cli.script import launch
from megacpp_nemo.planner.communication import volumes
from megacpp_nemo.planner.counts import counts
from megacpp_nemo.planner.gpus import GPUS
from megacpp_nemo.planner.memory import rank_memory
from megacpp_nemo.report.figures import about
from megacpp_nemo.report.numbers import size
from megacpp_nemo.report.page import page

H200 = GPUS["h200"]
VOID = {"meta", "link", "br", "img", "input"}
SHAPES = {"rect", "path", "line"}


class Page(HTMLParser):
    """A page read with the standard library: elements, their text, and whether all are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.wrong: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def rows(self) -> list[list[str]]:
        """Return the text of every row of every table, cell by cell."""
        return [
            [cell.strip() for cell in row.strip().split("\n")] for row in self.texts.get("tr", [])
        ]

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """Return the attributes of all elements of a tag that have these attributes."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [own for name, own in self.elements if name == tag and wanted.items() <= own.items()]


@pytest.fixture(scope="module")
def text(on):
    return page(on("0.16.1", "nam56r"), on("0.16.1", "nam52"))


@pytest.fixture(scope="module")
def read(text):
    return Page(text)


def test_every_element_is_closed_and_every_id_is_once(read):
    assert (read.wrong, read.open) == ([], [])
    ids = [own["id"] for _, own in read.elements if "id" in own]
    assert len(ids) == len(set(ids))
    for _, own in read.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert name not in own or own[name] in ids
        if own.get("href", "").startswith("#"):
            assert own["href"][1:] in ids


def test_nothing_of_the_page_lies_elsewhere(text, read):
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+", text.replace("http://www.w3.org", ""))
    assert [own["href"] for own in read.all("link")] == ["data:,"]
    assert not [own for _, own in read.elements if "src" in own or "style" in own]
    assert "@import" not in text
    assert "url(" not in text


def test_the_policy_allows_the_own_style_and_script_only(text, read):
    (policy,) = (own["content"] for own in read.all("meta") if "http-equiv" in own)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_tables_have_headers_with_a_scope_and_a_caption(read):
    headers = read.all("th")
    assert headers
    assert {own["scope"] for own in headers} == {"col", "row"}
    assert len(read.texts["caption"]) == len(read.all("table"))
    assert next(name for name, _ in read.elements if name in ("h1", "h2")) == "h1"
    assert len(read.all("h1")) == 1


def test_the_tables_hold_what_the_planner_says(on, text):
    recipe = on("0.16.1", "nam56r").recipe
    rows = Page(page(on("0.16.1", "nam56r"))).rows()
    own, memory = counts(recipe).whole, rank_memory(recipe, 0)
    assert ["all", f"{own.total:,}", "100.0%", f"{own.active:,}"] in rows
    assert [
        "stage 1",
        size(memory.weights_bytes),
        size(memory.gradients_bytes),
        size(memory.optimizer_bytes),
        size(memory.activations_bytes),
        size(memory.logits_bytes),
        size(memory.total_bytes),
    ] in rows
    sent = sum(volume.bytes_per_rank for volume in volumes(recipe, 0))
    assert [row for row in rows if row[0] == "all" and row[-1] == size(sent)]


def test_bars_are_as_long_as_what_they_stand_for(on):
    subject = on("0.16.1", "nam56r", "pipeline_model_parallel_size=2")
    found = Page(page(subject))
    parts = [own for own in found.all("rect", height="24") if own.get("class", "")[0] == "p"]
    for stage in range(2):
        long = sum(float(own["width"]) for own in parts[5 * stage : 5 * stage + 5])
        held = rank_memory(subject.recipe, stage).total_bytes
        assert long == pytest.approx(1000 * held / H200.memory_bytes, abs=0.05)


def test_a_layout_that_does_not_fit_is_told_by_how_much(on):
    subject = on("0.16.1", "nam56r", "micro_batch_size=16", gpu="h100")
    held, room = rank_memory(subject.recipe, 0).total_bytes, GPUS["h100"].memory_bytes
    assert held > room
    text = page(subject)
    assert f"does not fit into an NVIDIA H100 SXM 80 GB: {size(held - room)} too much." in text
    assert "0 native" not in text


def test_the_command_is_what_lower_prints(on, read):
    (command,) = read.texts["pre"]
    assert command == "\n".join(launch(on("0.16.1", "nam56r").lowering))


def test_a_refused_recipe_has_the_refusal_whole(on):
    subject = on("0.15.3", "nam56r")
    found = Page(page(subject, on("0.15.3", "nam52")))
    (refusal,) = found.texts["pre"]
    for part in (subject.refusal.what, subject.refusal.given, subject.refusal.allowed):
        assert part in refusal
    assert "--release 0.16.1" in refusal
    assert not found.all("button", id="copy")
    assert len([own for own in found.all("button") if "data-layer" in own]) == 104
    assert not [row for row in found.rows() if row[0] == "seams"]


def test_the_comparison_says_what_differs(on):
    one = on("0.16.1", "nam56r")
    other = on("0.16.1", "nam56r", "pipeline_model_parallel_size=2", "lr=1e-3")
    rows = Page(page(one, other)).rows()
    assert ["parallelism.pipeline_model_parallel_size", "1", "2"] in rows
    assert ["schedule.lr", "0.0003", "0.001"] in rows
    assert ["--lr", "0.0003", "0.001"] in rows
    assert ["layers", "52", "52", "same"] in rows
    bubble = next(row for row in rows if row[0] == "pipeline bubble" and len(row) == 4)
    assert bubble[1] == "0.0%"
    assert bubble[3] == "new"


def test_a_recipe_beside_itself_differs_in_nothing(on):
    text = page(on("0.16.1", "nam52_tiny"), on("0.16.1", "nam52_tiny"))
    assert "They are one and the same recipe." in text
    assert "Fields that differ" not in text


def test_what_a_user_wrote_is_text_and_no_markup(on):
    evil = '<script>alert("x")</script>'
    text = page(on("0.16.1", "nam52_tiny", f"name={evil}", f"run_dir={evil}"))
    assert evil not in text
    assert "&lt;script&gt;alert(" in text
    assert len(re.findall("<script", text)) == 1


def test_the_same_recipe_gives_the_same_bytes(on, text):
    assert page(on("0.16.1", "nam56r"), on("0.16.1", "nam52")) == text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("nam56r",), True),
        (("nam56r", "pipeline_model_parallel_size=2", "precision=fp8"), True),
        (("nam56r", "depth=24", "a_ranks=0"), False),
        (("nam56r", "hidden_size=7168"), False),
    ],
)
def test_a_recipe_is_described_by_its_name_while_it_has_that_model(on, words, named):
    assert ("full size, 52 layers" in about(on("0.19.0", *words))) is named
