"""The report in a real browser: every chart draws, nothing is refused or fetched, it fits a phone and follows the dark.

Chromium is spoken to through a pipe, in its own protocol: no driver, no port.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.profile.report import write_report
from tests.sample_results import everything, many

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 90.0
# The browser reads commands from descriptor 3 and answers on 4.
STARTER = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for end, fd in zip(ends, (3, 4)):
    os.dup2(end, fd)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str:
    """The browser's path, of $EDGE_BROWSER or by its usual names."""
    for name in (os.environ.get("EDGE_BROWSER"), *NAMES):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise AssertionError("no browser: install chromium, or say in $EDGE_BROWSER which one to use")


class Browser:
    """One page of a headless browser. ``said`` is what its console and its log said, as text."""

    def __init__(self, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={profile}", "--no-first-run", "--disable-dev-shm-usage", "about:blank"]
        command = [sys.executable, "-c", STARTER, str(ours[0]), str(theirs[1]), find_browser(), *flags]
        self.process = subprocess.Popen(
            command, pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.write, self.read = ours[1], theirs[0]
        self.buffer, self.count, self.session = b"", 0, ""
        self.said: list[str] = []
        self.asked: list[str] = []
        pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """Ends the browser."""
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)

    def message(self, until: float) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(until - time.monotonic(), 0))
            data = os.read(self.read, 1 << 20) if ready else b""
            assert data, "the browser does not answer"
            self.buffer += data
        text, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(text)

    def call(self, method: str, **params: Any) -> Any:
        """A command's result; what happens meanwhile is heard."""
        self.count += 1
        sent = {"id": self.count, "method": method, "params": params}
        if self.session:
            sent["sessionId"] = self.session
        data = json.dumps(sent).encode() + b"\0"
        while data:
            data = data[os.write(self.write, data) :]
        until = time.monotonic() + PATIENCE
        while True:
            found = self.message(until)
            if found.get("id") == self.count:
                assert "error" not in found, found["error"]
                return found["result"]
            self.hear(found)

    def hear(self, event: dict[str, Any]) -> None:
        """Keeps what a page complains of, and every address that it asks for."""
        params = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            self.said.append(params["entry"]["text"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.said.append(json.dumps(params["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(arg.get("value", arg)) for arg in params["args"]))
        elif event.get("method") == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"][:100])

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def size(self, width: int, height: int, scale: float = 1.0, mobile: bool = False) -> None:
        """The size of the window, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def scheme(self, name: str) -> None:
        """light or dark, as the system would say it."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def open(self, path: Path, mark: str = "") -> None:
        """Opens a report, and waits until all of it is drawn."""
        self.call("Page.navigate", url="about:blank")
        self.said.clear()
        self.asked.clear()
        self.call("Page.navigate", url=path.as_uri() + mark)
        self.wait("Boolean(document.documentElement?.dataset.ready)")

    def wait(self, condition: str) -> None:
        """Until an expression holds."""
        until = time.monotonic() + PATIENCE
        while not self.run(condition):
            assert time.monotonic() < until, f"never: {condition}"
            time.sleep(0.05)

    def picture(self, path: Path, full: bool = True) -> None:
        """A screenshot of the whole page, or of what the window shows."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(everything(), path)
    return path


CHARTS = "[...document.querySelectorAll('.chart')]"
# A chart that has drawn has axes with ticks, and something inside them.
UNDRAWN = f"""{CHARTS}.filter((c) => !c.querySelector('.main-svg .xtick text')
    || !c.querySelector('.main-svg .ytick text') || !c.querySelector('.trace path')
    || c.querySelector('.main-svg').clientWidth < 200).map((c) => c.id)"""
WIDE = """[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest('.scroll') && !e.closest('svg')).map((e) => e.tagName + '.' + e.className).slice(0, 5)"""
SMALL = """[...document.querySelectorAll('main *, svg text')].filter((e) => e.childNodes.length
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
    && parseFloat(getComputedStyle(e).fontSize) < 12 && e.getClientRects().length)
    .map((e) => e.textContent).slice(0, 5)"""


def clean(browser: Browser, path: Path) -> None:
    """Nothing was complained of, and nothing but the page itself was asked for."""
    assert browser.said == []
    assert [url for url in browser.asked if not url.startswith(("blob:", "data:"))] == [path.as_uri()[:100]]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (360, True)], ids=["desktop", "phone"])
def test_every_chart_draws_and_nothing_is_fetched(
    browser: Browser, report: Path, scheme: str, width: int, mobile: bool
) -> None:
    browser.size(width, 900, mobile=mobile)
    browser.scheme(scheme)
    browser.open(report)
    assert browser.run("document.documentElement.dataset.ready") == "yes"
    assert browser.run(f"{CHARTS}.length") == 14
    assert browser.run(UNDRAWN) == []
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run(WIDE) == []
    assert browser.run(SMALL) == []
    clean(browser, report)


@pytest.mark.slow
def test_nothing_is_too_wide_when_every_table_is_open(browser: Browser, report: Path) -> None:
    browser.size(360, 800, mobile=True)
    browser.scheme("light")
    browser.open(report)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") == 360
    assert browser.run(WIDE) == []
    assert browser.run(SMALL) == []


@pytest.mark.slow
def test_dark_and_light_follow_the_system_while_the_page_is_open(browser: Browser, report: Path) -> None:
    browser.size(1000, 800)
    browser.scheme("light")
    browser.open(report)
    paper = "getComputedStyle(document.body).backgroundColor"
    ink = "document.querySelector('.xtick text').style.fill"
    light = browser.run(paper), browser.run(ink)
    browser.scheme("dark")
    browser.wait(f"{ink} !== '{light[1]}'")
    dark = browser.run(paper), browser.run(ink)
    assert dark[0] == "rgb(15, 18, 22)"
    assert light[0] == "rgb(246, 247, 249)"
    browser.scheme("light")
    browser.wait(f"{ink} === '{light[1]}'")
    assert (browser.run(paper), browser.run(ink)) == light
    clean(browser, report)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(browser: Browser, report: Path, scheme: str) -> None:
    """WCAG's 4.5 to 1 for text; 3 to 1 for lines and markers of budgets."""
    browser.scheme(scheme)
    browser.open(report)
    luminance = """((name) => { const p = document.createElement('p'); p.style.color = `var(${name})`;
        document.body.append(p);
        const c = getComputedStyle(p).color.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        p.remove(); return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; })"""

    def contrast(front: str, back: str) -> float:
        a, b = sorted((browser.run(f"{luminance}('{front}')"), browser.run(f"{luminance}('{back}')")))
        return (b + 0.05) / (a + 0.05)

    pairs = [("--ink", "--surface"), ("--muted", "--surface"), ("--muted", "--paper"), ("--link", "--paper")]
    pairs += [("--bad", "--bad-bg"), ("--good", "--good-bg"), ("--doubt", "--doubt-bg"), ("--muted", "--note-bg")]
    pairs += [("--limit", "--surface")]
    assert {pair: round(contrast(*pair), 2) for pair in pairs if contrast(*pair) < 4.5} == {}
    marks = [*(f"--b{i}" for i in range(5)), "--peer", "--device"]
    assert {mark: round(contrast(mark, "--surface"), 2) for mark in marks if contrast(mark, "--surface") < 3} == {}


@pytest.mark.slow
def test_labels_of_marks_do_not_cover_each_other(browser: Browser, report: Path) -> None:
    covered = f"""{CHARTS}.filter((c) => c.id.startsWith('memory')).flatMap((c) => {{
        const boxes = [...c.querySelectorAll('.annotation-text')].map((t) => [t.textContent, t.getBoundingClientRect()])
            .filter(([text]) => !text.startsWith('budget'));
        return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>
            Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1
            && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3)
            .map(([b]) => `${{c.id}}: ${{a}} / ${{b}}`)); }})"""
    for width in (360, 1280):
        browser.size(width, 900)
        browser.open(report)
        assert browser.run(covered) == []


@pytest.mark.slow
def test_charts_follow_the_width_of_the_window(browser: Browser, report: Path) -> None:
    browser.size(1280, 900)
    browser.open(report)
    browser.size(400, 900)
    browser.wait(f"{CHARTS}.every((c) => Math.abs(c.querySelector('.main-svg').clientWidth - c.clientWidth) < 2)")
    assert browser.run("document.documentElement.scrollWidth") == 400
    assert browser.run(UNDRAWN) == []


@pytest.mark.slow
def test_the_lines_can_be_had_as_they_were(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert browser.run("document.getElementById('raw').download") == "results.jsonl"
    folder = report.parent / "downloads"
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.run("document.getElementById('raw').click()")
    until = time.monotonic() + PATIENCE
    while not (folder / "results.jsonl").exists():
        assert time.monotonic() < until, "nothing was saved"
        time.sleep(0.05)
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == everything()


@pytest.mark.slow
def test_without_scripts_every_table_is_there(browser: Browser, report: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.call("Page.navigate", url=report.as_uri())
        time.sleep(1)
        browser.call("DOM.enable")
        root = browser.call("DOM.getDocument", depth=0)["root"]["nodeId"]
        found = browser.call("DOM.querySelector", nodeId=root, selector="noscript p")
        assert found["nodeId"]
        chart = browser.call("DOM.querySelector", nodeId=root, selector=".chart")["nodeId"]
        browser.call("CSS.enable")
        computed = browser.call("CSS.getComputedStyleForNode", nodeId=chart)["computedStyle"]
        style = {item["name"]: item["value"] for item in computed}
        assert style["display"] == "none"
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.slow
def test_a_browser_that_cannot_unpack_says_so_and_keeps_the_tables(browser: Browser, report: Path) -> None:
    made = browser.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    try:
        browser.open(report)
        assert browser.run("document.documentElement.dataset.ready") == "no"
        assert "Every number is in the tables" in browser.run("document.getElementById('trouble').textContent")
        assert browser.run("document.getElementById('trouble').hidden") is False
        assert browser.run("getComputedStyle(document.querySelector('.chart')).display") == "none"
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=made["identifier"])


@pytest.mark.slow
def test_a_script_that_is_not_of_the_page_does_not_run(browser: Browser, report: Path, tmp_path: Path) -> None:
    """What would happen if escaping failed: the policy refuses it, and the charts draw all the same."""
    evil = tmp_path / "evil.html"
    text = report.read_text(encoding="utf-8").replace(
        "<main>", "<main><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"
    )
    evil.write_text(text, encoding="utf-8")
    browser.open(evil)
    assert browser.run("window.ran === undefined") is True
    assert browser.run(UNDRAWN) == []
    assert len([said for said in browser.said if "Content Security Policy" in said]) >= 2


@pytest.mark.slow
def test_forty_cases_draw(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "many.html"
    write_report(many(40), path)
    browser.size(390, 844, mobile=True)
    browser.open(path)
    assert browser.run(UNDRAWN) == []
    assert browser.run("document.documentElement.scrollWidth") == 390
    clean(browser, path)


@pytest.mark.slow
def test_the_picture_is_cards_and_four_charts(browser: Browser, report: Path) -> None:
    browser.size(1200, 900)
    browser.open(report, "#picture")
    shown = f"{CHARTS}.filter((c) => c.clientWidth).map((c) => c.id)"
    assert [name.partition("-")[0] for name in browser.run(shown)] == ["memory", "speed", "roofline", "first"]
    assert browser.run("document.querySelectorAll('.card').length") == 7
    assert browser.run("document.documentElement.scrollHeight") < 2100


@pytest.mark.slow
def test_it_prints_light_in_one_column_with_every_table(browser: Browser, report: Path) -> None:
    browser.size(1280, 900)
    browser.scheme("dark")
    browser.open(report)
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("document.querySelectorAll('details:not([open])').length") == 0
    assert browser.run(f"{CHARTS}.every((c) => c.clientWidth < 720 && c.querySelector('.main-svg').clientWidth < 720)")
    assert browser.run("getComputedStyle(document.body).color") == "rgb(26, 29, 35)"
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run("getComputedStyle(document.body).color") == "rgb(236, 239, 244)"
    browser.scheme("light")
