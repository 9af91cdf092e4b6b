"""The page in a real browser: a desktop and a phone, light and dark, pointed at, copied, printed.

Chromium is asked for by its usual names on PATH, and driven by playwright.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megacpp_nemo.report.ownership import command_text
from megacpp_nemo.report.page import page

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESKTOP, PHONE = (1280, 900), (390, 844)
# Text whose contrast is too low, with its colours: each character on the first opaque ground.
LOW_CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return parse(getComputedStyle(document.documentElement).backgroundColor);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const shown = node.checkVisibility() && walker.currentNode.data.trim();
    if (!shown || ["SCRIPT", "STYLE", "TITLE"].includes(node.tagName.toUpperCase())) continue;
    const pair = [light(parse(getComputedStyle(node).color)), light(ground(node))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) found.push([walker.currentNode.data.trim().slice(0, 30), ratio]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no Chromium on PATH: looked for {', '.join(NAMES)}")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(on, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages: a whole one with a comparison, and one of a recipe that is refused."""
    folder = tmp_path_factory.mktemp("pages")
    other = on("0.16.1", "nam56r", "pipeline_model_parallel_size=2")
    made = {
        "whole": page(on("0.16.1", "nam56r"), other),
        "refused": page(on("0.15.3", "nam56r")),
    }
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture
def shown(chromium: Any, files: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Return `shown(name, size, scheme) -> page`; it fails if the page complains or asks."""
    complaints: list[str] = []
    asked: list[str] = []
    with contextlib.ExitStack() as stack:

        def show(
            name: str = "whole",
            size: tuple[int, int] = DESKTOP,
            scheme: str = "light",
            scripts: bool = True,
        ) -> Any:
            context = chromium.new_context(
                viewport={"width": size[0], "height": size[1]},
                color_scheme=scheme,
                has_touch=size == PHONE,
                java_script_enabled=scripts,
                permissions=["clipboard-read", "clipboard-write"],
            )
            stack.callback(context.close)
            opened = context.new_page()
            opened.on("console", lambda message: complaints.append(message.text))
            opened.on("pageerror", lambda error: complaints.append(str(error)))
            opened.on("request", lambda request: asked.append(request.url))
            opened.goto(files[name].as_uri())
            return opened

        yield show
    assert complaints == []
    own = {path.as_uri() for path in files.values()}
    assert [url for url in asked if url not in own and url != "data:,"] == []


@pytest.mark.parametrize("name", ["whole", "refused"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_layer_has_its_cell_and_the_page_is_as_wide_as_the_screen(shown, name, size):
    opened = shown(name, size)
    cells = opened.locator("#layers [data-layer]")
    assert cells.count() == 52
    numbers = cells.evaluate_all("nodes => nodes.map((node) => Number(node.dataset.layer))")
    assert numbers == list(range(1, 53))
    boxes = cells.evaluate_all(
        "nodes => nodes.map((n) => n.getBoundingClientRect())"
        ".map((box) => [box.left, box.right, box.width])"
    )
    # As wide as a finger needs (WCAG 2.2, target size), and within the screen.
    assert all(left >= 0 and right <= size[0] and width >= 24 for left, right, width in boxes)
    assert opened.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_pointing_at_a_layer_tells_its_figures(shown):
    opened = shown()
    detail = opened.locator("#layers .detail")
    opened.locator("#layers [data-layer='12']").hover()
    assert "Layer 12: M2RNN; seam m2rnn" in detail.inner_text()
    for figure in ("stage 1", "8.21 M", "15.7 MiB", "18.0 MFLOP", "model.recurrent.RecurrentMixer"):
        assert figure in detail.inner_text()
    opened.locator("#layers [data-layer='2']").hover()
    assert "mixture of experts; native" in detail.inner_text()


def test_a_tap_on_a_phone_tells_the_same_beside_the_cell(shown):
    opened = shown(size=PHONE)
    cell = opened.locator("#layers [data-layer='52']")
    cell.tap()
    detail = opened.locator("#layers .detail")
    assert "Layer 52" in detail.inner_text()
    assert "Layer 52" not in opened.locator("#comparison .detail").inner_text()
    box = detail.bounding_box()
    assert 0 <= box["y"] < box["y"] + box["height"] <= PHONE[1] + 1


def test_arrow_keys_move_and_the_strip_is_one_stop_of_the_tab_key(shown):
    opened = shown()
    stops = opened.locator("#layers .cell").evaluate_all(
        "nodes => nodes.filter((node) => node.tabIndex === 0).length"
    )
    assert stops == 1
    opened.locator("#layers [data-layer='1']").focus()
    for key, layer in (("ArrowRight", "2"), ("ArrowRight", "3"), ("ArrowLeft", "2")):
        opened.keyboard.press(key)
        assert opened.evaluate("document.activeElement.dataset.layer") == layer
    opened.keyboard.press("End")
    assert opened.evaluate("document.activeElement.getAttribute('aria-label')").startswith(
        "Depth 1, norm"
    )


def test_copy_gives_exactly_the_command(shown, on):
    opened = shown()
    opened.locator("#copy").click()
    opened.locator("#copied", has_text="Copied.").wait_for()
    command = command_text(on("0.16.1", "nam56r").lowering)
    assert opened.evaluate("navigator.clipboard.readText()") == command


def test_without_leave_to_copy_the_command_is_marked(shown, on):
    opened = shown()
    opened.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(Error('no')); }")
    opened.locator("#copy").click()
    opened.locator("#copied", has_text="Marked").wait_for()
    marked = opened.evaluate("getSelection().toString()")
    assert marked.rstrip("\n") == command_text(on("0.16.1", "nam56r").lowering)


@pytest.mark.parametrize("name", ["whole", "refused"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(shown, name, scheme):
    opened = shown(name, scheme=scheme)
    opened.locator("details").evaluate_all(
        "nodes => nodes.forEach((node) => { node.open = true; })"
    )
    opened.locator("#layers [data-layer='12']").hover()
    assert opened.evaluate(LOW_CONTRAST) == []


def test_dark_and_light_differ_and_families_keep_their_colours(shown):
    style = "(at) => getComputedStyle(document.querySelector(at))"
    grounds, families = set(), set()
    for scheme in ("light", "dark"):
        opened = shown(scheme=scheme)
        found = opened.evaluate(f"(at) => ({style})(at).backgroundColor", "body")
        grounds.add((found, opened.evaluate(f"(at) => ({style})(at).color", "body")))
        families.add(opened.evaluate(f"(at) => ({style})(at).backgroundColor", ".f-R"))
    assert grounds == {
        ("rgb(255, 255, 255)", "rgb(26, 28, 31)"),
        ("rgb(20, 22, 26)", "rgb(232, 234, 237)"),
    }
    assert families == {"rgb(204, 121, 167)"}


def test_it_prints_on_white_with_everything_open_and_no_button(shown):
    opened = shown(scheme="dark")
    data = opened.pdf(format="A4")
    assert data.startswith(b"%PDF-")
    opened.emulate_media(media="print")
    assert not opened.locator("#copy").is_visible()
    assert not opened.locator("nav").is_visible()
    ground = "getComputedStyle(document.body).backgroundColor"
    assert opened.evaluate(ground) == "rgb(255, 255, 255)"
    # Printing has opened them.
    closed = opened.locator("details:not([open])")
    assert closed.count() == 0


def test_it_reads_without_scripts(shown):
    opened = shown(scripts=False)
    assert opened.locator("#layers [data-layer]").count() == 52
    opened.locator("#layers summary").click()
    rows = opened.locator("#layers tbody tr")
    assert rows.count() == 59
    assert rows.nth(12).inner_text().startswith("layer 12")


def test_the_page_may_ask_for_nothing(chromium, files):
    opened = chromium.new_page()
    failed: list[str] = []
    opened.on("requestfailed", lambda request: failed.append(request.failure))
    opened.goto(files["whole"].as_uri())
    refused = opened.evaluate(
        """() => new Promise((done) => {
            const found = [];
            document.addEventListener("securitypolicyviolation", (event) => {
                found.push(event.effectiveDirective);
                if (found.length === 3) done(found.sort());
            });
            const image = document.createElement("img");
            image.src = "https://example.invalid/a.png";
            const script = document.createElement("script");
            script.textContent = "document.title = 'taken'";
            document.body.append(image, script);
            fetch("https://example.invalid/").catch(() => {});
        })"""
    )
    assert refused == ["connect-src", "img-src", "script-src-elem"]
    # By the policy, before anything is sent.
    assert set(failed) <= {"csp"}
    assert opened.title() == "nam56r on Megatron-LM 0.16.1"
    opened.close()
