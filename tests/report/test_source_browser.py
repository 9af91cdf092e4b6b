"""The page of a source file in a real browser: the switch, pointing, the keyboard, a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacpp_nemo.report.source import Source
from megacpp_nemo.report.source_page import source_page
from tests.report.test_report_browser import LOW_CONTRAST, PHONE, chromium

__all__ = ["chromium"]
pytestmark = pytest.mark.browser
TEXT = '\t// </script><script>document.title = "taken"</script>\nint f() { return 1; }\n' + (
    "int long_line_of_many_words = a + b + c + d + e + f + g + h + i + j + k + l;\n" * 3
)
CHANNELS = {"category": 10, "dependency_level": 17, "ast_depth": 65, "node_type": 257}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every id of every channel: a token is three bytes, or what is left."""
    content = TEXT.encode() * 5
    starts = np.arange(0, len(content), 3)
    source = Source(
        name="src/box.h",
        content=content,
        starts=starts,
        ids=np.arange(len(starts)) + 5,
        channels={name: np.arange(len(starts)) % size for name, size in CHANNELS.items()},
        notes=("A note of <b>it</b>.",),
        first=0,
        last=len(starts),
        shown=(0, len(content)),
    )
    path = tmp_path_factory.mktemp("source") / "page.html"
    path.write_text(source_page(source, "category"), encoding="utf-8")
    return path


@pytest.fixture(params=["light", "dark"])
def opened(chromium: Any, page: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page on a phone; it fails if the page complains or asks for anything."""
    heard: list[str] = []
    context = chromium.new_context(
        viewport={"width": PHONE[0], "height": PHONE[1]},
        color_scheme=request.param,
        has_touch=True,
    )
    shown = context.new_page()
    shown.on("console", lambda message: heard.append(message.text))
    shown.on("pageerror", lambda error: heard.append(str(error)))
    shown.on("request", lambda asked: heard.append(asked.url))
    shown.goto(page.as_uri())
    yield shown
    context.close()
    assert [each for each in heard if each not in (page.as_uri(), "data:,")] == []


def test_the_switch_a_tap_and_the_keyboard(opened):
    assert opened.title() == "src/box.h"
    assert opened.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    assert opened.locator(".source").inner_text() == TEXT * 5
    tokens = opened.locator(".source i")
    before = tokens.nth(4).get_attribute("class")
    opened.get_by_role("radio", name="depth in the syntax tree").check()
    assert tokens.nth(4).get_attribute("class") != before
    assert opened.locator(".legend:visible").get_attribute("data-channel") == "ast_depth"
    assert opened.evaluate(LOW_CONTRAST) == []

    tokens.nth(1).tap()
    detail = opened.locator(".detail")
    assert detail.locator(".text").inner_text() == '" </"'
    facts = dict(
        zip(*(detail.locator(part).all_inner_texts() for part in ("dt", "dd")), strict=True)
    )
    assert facts == {
        "token": "1",
        "token id": "6",
        "byte": "3",
        "structure category": "function signature",
        "dependency level": "1",
        "depth in the syntax tree": "1",
        "node type": "directive",
    }
    opened.locator(".source").focus()
    opened.keyboard.press("ArrowRight")
    assert detail.locator("dd").first.inner_text() == "2"
    opened.keyboard.press("End")
    last = opened.locator("i.chosen").bounding_box()
    assert 0 <= last["y"] <= PHONE[1]
    # What was pointed at stays marked when another channel is chosen.
    opened.get_by_role("radio", name="node type").check()
    assert opened.locator("i.chosen").count() == 1
    assert opened.evaluate(LOW_CONTRAST) == []
