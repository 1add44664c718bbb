"""The live page in a real browser, over a stack that answers.

Planted faults seen red: a script that the policy for contents forbids, figures that never change,
a heat map without keys, a table that is wider than a phone, colours that do not heed the scheme, a
stop that waits for an open page, a key that is asked for and not sent, a chat with a model that has
no template.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chromium import BINARY, Page, browsing
from tests.stack import ServedStack, answering, served

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(BINARY is None, reason="no chromium is installed"),
]
LIVE = "document.getElementById('state')?.innerText === 'live'"


@pytest.fixture(scope="module")
def stack(chat_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedStack]:
    with served(chat_store, tmp_path_factory.mktemp("fm"), "--http", "0") as found:
        yield found


@pytest.fixture
def page(stack: ServedStack) -> Iterator[Page]:
    """Open and live; whatever a test does, nothing may go wrong in its console."""
    with browsing() as found:
        found.resize(1280, 900)
        found.open(f"{stack.url}/")
        found.wait(LIVE)
        yield found
        assert found.problems == []


def test_figures_are_those_of_now(stack: ServedStack, page: Page) -> None:
    with answering(stack, 100):
        page.wait("parseFloat(document.getElementById('speed').innerText) > 1")
        page.wait("document.getElementById('open').innerText === '1'")
        page.wait("document.querySelectorAll('#policies tbody tr').length >= 5")
        assert page.text("#in-charge").startswith("In charge: ")
        assert "optimum (MIN)" in page.text("#policies")
        assert page.text("#hits").endswith("%") and page.text("#busy").endswith("%")
        assert "MiB" in page.text("#memory") and "expert slots" in page.text("#parts")
        assert "ms" in page.text("#latency")
        assert "Of 256 experts in 8 layers" in page.text("#heat-summary")
        before = page.text("#clients")
        page.wait(f"document.getElementById('clients').innerText !== {before!r}")
    page.wait("document.getElementById('speed').innerText === '0.0'")
    assert page.text("#model") == "tiny-chat"


def test_the_heat_map_without_a_mouse(stack: ServedStack, page: Page) -> None:
    stack.generate(max_tokens=16)
    page.wait("document.getElementById('heat-summary').innerText.startsWith('Of 256')")
    for _ in range(20):
        page.press("Tab")
        if page.run("document.activeElement.id") == "heat":
            break
    assert page.text("#heat-cell").startswith("Layer 0, expert 0: ")
    page.press("ArrowDown", 2)
    page.press("ArrowRight", 5)
    assert page.text("#heat-cell").startswith("Layer 2, expert 5: ")
    page.press("ArrowUp", 9)
    page.press("ArrowLeft")
    assert page.text("#heat-cell").startswith("Layer 0, expert 4: ")
    page.press("Tab")
    assert page.run("document.activeElement.tagName") == "SUMMARY"
    page.press("Enter")
    page.wait("document.querySelectorAll('#heat-table tbody tr').length === 8")
    row = "[...document.querySelector('#heat-table tbody tr').cells].slice(1)"
    assert page.run(f"{row}.reduce((sum, cell) => sum + Number(cell.innerText), 0)") == 32


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(stack: ServedStack, page: Page, width: int) -> None:
    stack.generate(max_tokens=16)
    page.resize(width, 740)
    page.wait("document.querySelectorAll('#policies tbody tr').length >= 5")
    assert page.run("document.documentElement.scrollWidth") <= width
    cut = "[...document.querySelectorAll('main *')].filter((one) => one.clientWidth && "
    cut += "one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML)"
    assert page.run(cut) == []


def test_dark_is_dark(page: Page) -> None:
    def brightness(selector: str, name: str) -> int:
        colour = f"getComputedStyle(document.querySelector({selector!r})).{name}"
        return int(page.run(f"{colour}.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"))

    page.prefer("light")
    assert brightness("body", "backgroundColor") > 600 > 300 > brightness("body", "color")
    page.prefer("dark")
    assert brightness("body", "backgroundColor") < 200 < 600 < brightness("body", "color")


def test_what_a_browser_is_told_to_keep_to(stack: ServedStack) -> None:
    with urllib.request.urlopen(f"{stack.url}/", timeout=5) as reply:
        policy, tag = reply.headers["Content-Security-Policy"], reply.headers["ETag"]
        assert b"http" not in reply.read().replace(b"https://huggingface.co", b"")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    again = urllib.request.Request(f"{stack.url}/", headers={"If-None-Match": tag})
    with pytest.raises(urllib.error.HTTPError, match="304"):
        urllib.request.urlopen(again, timeout=5)
    for path in ("/page/nothing.js", "/page/..%2froutes.py", "/metrics/nothing"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{stack.url}{path}", timeout=5)


def test_an_open_page_does_not_hold_the_stack_up(tiny_store: Path, run_dir: Path) -> None:
    with served(tiny_store, run_dir, "--http", "0") as stack, browsing() as page:
        page.open(f"{stack.url}/")
        page.wait(LIVE)
        start_s = time.monotonic()
        assert stack.stop() == 0
        assert time.monotonic() - start_s < 10
        page.wait("document.getElementById('state').innerText.includes('trying again')")


def ask(page: Page, text: str) -> str:
    """Type into the box, and read the answer once it has come."""
    page.run("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")
    page.wait("document.querySelector('#turns .assistant:last-child small')")
    return page.text("#turns .assistant:last-child span")


def test_the_box_answers_as_the_node_does(stack: ServedStack, page: Page) -> None:
    """Two turns of a conversation by keys alone; Stop, and a new one."""
    page.run("document.getElementById('longest').value = '64'")
    first = ask(page, "Hello")
    assert first and page.text("#chat-note") == ""
    assert "tokens/s; the first after" in page.text("#turns .assistant small")
    page.run("document.querySelector('#turns .assistant small').remove()")
    second = ask(page, "And then?")
    assert page.run("document.querySelectorAll('#turns li').length") == 4 and second
    page.run("document.getElementById('longest').value = '1024'")
    page.type("Go on")
    page.press("Enter")
    page.wait(
        "!document.getElementById('stop').hidden && "
        "document.querySelector('#turns .assistant:last-child span').innerText"
    )
    page.press("Tab", 2)
    assert page.run("document.activeElement.id") == "stop"
    page.press("Enter")
    page.wait("document.getElementById('stop').hidden")
    page.wait("document.getElementById('open').innerText === '0'")
    page.run("document.getElementById('reset').click()")
    assert page.text("#turns") == ""


def test_a_model_without_a_template_goes_on_from_the_text(tiny_store: Path, run_dir: Path) -> None:
    with served(tiny_store, run_dir, "--http", "0") as stack, browsing() as page:
        page.open(f"{stack.url}/")
        page.wait("document.getElementById('chat-note')?.innerText.includes('goes on from')")
        assert ask(page, "In the beginning")
        assert page.problems == []


def test_a_page_behind_keys_asks_for_one(chat_store: Path, run_dir: Path, tmp_path: Path) -> None:
    """By the keyboard; a wrong key is said to be wrong, and the figures wait for the right one."""
    (tmp_path / "keys").write_text("open-sesame\n")
    flags = ["--http", "0", "--api-key-file", str(tmp_path / "keys")]
    with served(chat_store, run_dir, *flags) as stack, browsing() as page:
        for path in ("/live", "/metrics/compute_node", "/v1/models"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{stack.url}{path}", timeout=5)
        page.open(f"{stack.url}/")
        page.wait("document.getElementById('key')?.open")
        assert page.run("document.activeElement.id") == "key-text" and page.problems == []
        page.type("simsim")
        page.press("Enter")
        page.wait("document.getElementById('key-problem').innerText.includes('did not take')")
        page.type("open-sesame")
        page.press("Enter")
        page.wait(LIVE)
        assert not page.run("document.getElementById('key').open")
