"""The page of `rebasin ui` in a real browser: from a click to a file that is, to the bit, the command's.

    pip install 'git-rebasin[ui]' playwright      (and Chromium: `playwright install chromium`, or the system's)
    python -m pytest tests/test_ui_browser.py -m browser

REBASIN_CHROMIUM names the browser's program where playwright has none of its own; REBASIN_SCREENSHOTS a folder for
pictures of the page, wide and narrow, light and dark, to be looked at.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from cli_files import Files, content, digest, rebasin

pytestmark = pytest.mark.browser

WIDE, NARROW = {"width": 1400, "height": 1000}, {"width": 390, "height": 844}
MINUTES = 10 * 60_000  # a machine may be busy


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    Files(folder)
    (folder / "broken.safetensors").write_bytes(b'\x08\0\0\0\0\0\0\0{"a":1}x')
    (folder / "runs" / "one").mkdir(parents=True)
    (folder / "runs" / "one" / "report.html").write_text(
        "<h1>A run</h1><script>parent.document.title = 'x'</script>"
    )
    return folder


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    """The page's server, as a user starts it; it ends by Ctrl-C."""
    command = [sys.executable, "-P", "-m", "rebasin", "ui", "--root", str(root)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert server.stdout is not None
    found = next(
        (m[0] for line in server.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+/", line))), None
    )
    assert found, "the server has ended"
    yield found
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with import_module("playwright.sync_api").sync_playwright() as playwright:
        program = os.environ.get("REBASIN_CHROMIUM") or shutil.which("chromium")
        own = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield own
        own.close()


@contextlib.contextmanager
def opened(
    browser: Any, address: str, dark: bool = False, size: Any = None, refused: str | None = None
) -> Iterator[Any]:
    """A window with the page, whose errors and requests to other places fail the test; `refused` is part of the error
    that a script has to have.
    """
    context = browser.new_context(
        viewport=size or WIDE, color_scheme="dark" if dark else "light", accept_downloads=True
    )
    context.set_default_timeout(MINUTES)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if foreign(request.url, address) else None)
    page.goto(address)
    page.wait_for_selector("#merge")
    page.wait_for_timeout(1500)  # until its first tick
    yield page
    context.close()
    assert [one for one in wrong if refused is None or refused not in one] == []
    assert refused is None or wrong


def foreign(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def choose(page: Any, field: str, value: str) -> None:
    box = page.locator(f"#{field} input").first
    box.click()
    box.fill(value)
    box.press("Enter")


def write(page: Any, field: str, value: str) -> None:
    box = page.locator(f"#{field} textarea, #{field} input").first
    box.fill(value)
    box.press("Tab")


def models(page: Any, a: str = "a.safetensors", b: str = "b.safetensors", output: str = "") -> None:
    choose(page, "model-a", a)
    choose(page, "model-b", b)
    if output:
        write(page, "output", output)
    page.wait_for_function(
        "told => told.every(one => document.querySelector('#merge-line textarea').value.includes(one))",
        arg=[a, b, output],
    )


def ends(page: Any, status: str) -> None:
    page.wait_for_selector(f"#job-shown .job.{status}")


def line(page: Any, of: str = "merge-line") -> list[str]:
    return shlex.split(page.locator(f"#{of} textarea").input_value())


def picture(page: Any, name: str) -> None:
    """A picture to look at, and that nothing is wider than the window."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
    if folder := os.environ.get("REBASIN_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def by_command(words: list[str], output: Path) -> Path:
    """What the copied command line writes, under another name beside."""
    assert words[0] == "rebasin"
    again = output.with_name(f"again-{output.name}")
    rebasin(*(str(again) if Path(word).name == output.name else word for word in words[1:]))
    return again


def test_from_click_to_file(browser: Any, address: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    with opened(browser, address) as page:
        models(page, output="ab.safetensors")
        page.wait_for_function("document.querySelectorAll('#about .file').length === 2")
        assert "Stable Diffusion" in page.locator("#about").inner_text()
        page.click("#compare")
        ends(page, "done")
        assert "Do they share a basin?" in page.locator("#job-shown").inner_text()
        assert page.locator("#job-shown .chart tr").count() > 10
        picture(page, "compare-wide-light")

        page.click("#weights button")
        choose(page, "preset", "GRAD_V")
        page.wait_for_function(
            "document.querySelector('#merge-line textarea').value.includes('--weights GRAD_V')"
        )
        page.wait_for_selector("#sliders input[data-block='3']")
        picture(page, "weights-wide-light")
        slider = page.locator("#sliders input[data-block='3']")
        before = slider.input_value()
        slider.focus()
        for _ in range(3):
            page.keyboard.press("ArrowDown")
            page.wait_for_timeout(1000)
        page.wait_for_function("document.querySelector('#merge-line textarea').value.includes('IN')")
        assert float(page.locator("#sliders input[data-block='3']").input_value()) < float(before)
        page.click("#plan")
        page.wait_for_selector("#job-shown .job.done pre")
        assert "time about" in page.locator("#job-shown pre").inner_text()
        picture(page, "plan-wide-light")

        page.click("#merge")
        page.wait_for_selector("#job-shown .job.running")
        page.wait_for_selector("#job-shown .stages li")
        picture(page, "running-wide-light")
        ends(page, "done")
        told = page.locator("#job-shown").inner_text()
        assert "Is it legal?" in told and "Did anything move?" in told
        picture(page, "done-wide-light")
        page.click("#log button")
        with page.expect_download() as download:
            page.click("#job-shown .files a >> nth=0")
        written = root / "ab.safetensors"
        assert digest(Path(download.value.path())) == digest(written)
        words = line(page, "job-line")
        assert words[1:3] == ["merge", "a.safetensors"] and "--weights" in words
        assert content(by_command(words, written)) == content(written)


def test_what_is_wrong_is_told_in_a_sentence(browser: Any, address: str, root: Path) -> None:
    with opened(browser, address) as page:
        page.click("#merge")
        page.wait_for_selector("#merge-said .problem")
        models(page, b="broken.safetensors", output="never.safetensors")
        page.wait_for_selector("#about .file.bad")
        assert "broken.safetensors" in page.locator("#about .file.bad p").inner_text()
        page.click("#merge")
        ends(page, "failed")
        assert "broken.safetensors" in page.locator("#job-shown .problem").inner_text()
        picture(page, "failed-wide-light")
        choose(page, "model-b", "/etc/passwd")
        page.wait_for_function(
            "document.querySelector('#about .file.bad p')?.innerText.includes('leads out of')"
        )
        page.click("#merge")
        page.wait_for_function(
            "document.querySelector('#merge-said .problem')?.innerText.includes('leads out of')"
        )
    assert not (root / "never.safetensors").exists()


def test_cancel_and_again(browser: Any, address: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    with opened(browser, address, dark=True, size=NARROW) as page:
        models(page, output="cancelled.safetensors")
        page.click("#merge")
        page.wait_for_selector("#job-shown .job.running .now:has-text('align')")
        page.click("#cancel")
        ends(page, "cancelled")
        picture(page, "cancelled-narrow-dark")
        assert not (root / "cancelled.safetensors").exists()
        page.click("#again")
        ends(page, "done")
        picture(page, "done-narrow-dark")
        written = root / "cancelled.safetensors"
        assert content(by_command(line(page, "job-line"), written)) == content(written)
    assert not list(root.glob(".*"))


def test_two_windows_and_a_reload(browser: Any, address: str, root: Path) -> None:
    with opened(browser, address) as one, opened(browser, address, dark=True) as other:
        models(one, output="one.safetensors")
        models(other, b="f.safetensors", output="other.safetensors")
        one.click("#merge")
        one.wait_for_selector("#job-shown .job.running")
        other.click("#merge")
        other.wait_for_selector("#job-shown .job.waiting")
        other.click("#merge")
        other.wait_for_selector("#merge-said .problem")  # the same file twice
        one.reload()
        one.wait_for_function("document.querySelector('#job input')?.value.includes('other.safetensors')")
        choose(one, "job", "one.safetensors")
        one.wait_for_function(
            "document.querySelector('#job-shown .head b')?.innerText.includes('one.safetensors')"
        )
        ends(one, "done")
        ends(other, "done")
        assert "one.safetensors" in one.locator("#job-shown .head").inner_text()
        assert "other.safetensors" in other.locator("#job-shown .head").inner_text()
        picture(other, "done-wide-dark")
    assert (root / "one.safetensors").is_file() and (root / "other.safetensors").is_file()


def test_adapters_and_reports(
    browser: Any, address: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    if not (root / "ab.permutation.safetensors").exists():
        rebasin("merge", "a.safetensors", "b.safetensors", "-o", "ab.safetensors")
    with opened(browser, address, refused="Blocked a frame with origin") as page:
        page.get_by_role("tab", name="Adapters").click()
        choose(page, "apply-permutation", "ab.permutation.safetensors")
        choose(page, "apply-file", "lora.safetensors")
        write(page, "apply-output", "lora_moved.safetensors")
        page.wait_for_function("document.querySelector('#apply-line textarea').value.includes('lora_moved')")
        page.click("#apply")
        page.wait_for_selector("#job-shown .job.done:has-text('apply')")
        picture(page, "adapters-wide-light")
        written = root / "lora_moved.safetensors"
        assert content(by_command(line(page, "apply-line"), written)) == content(written)
        page.get_by_role("tab", name="Reports").click()
        choose(page, "runs", "runs/one")
        frame = page.frame_locator("#report iframe")
        assert frame.locator("h1").inner_text() == "A run"
        assert page.title() == "Git Re-Basin"  # its script has no power here
        picture(page, "reports-wide-light")


def test_an_uploaded_file(browser: Any, address: str, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    shutil.copy(root / "a.safetensors", file)
    with opened(browser, address, size=NARROW) as page:
        page.set_input_files("#upload input, input[type=file]", file)
        page.wait_for_function("document.querySelector('#model-a input').value.includes('mine.safetensors')")
        page.wait_for_selector("#about .file")
        picture(page, "upload-narrow-light")
    assert digest(root / "uploads" / "mine.safetensors") == digest(file)


def test_only_for_this_machine(address: str, root: Path) -> None:
    def asked(path: str, **headers: str) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(address + path, headers=headers)) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    assert asked("") == 200
    assert asked("", Host="elsewhere.example") == 400
    assert asked("files/wrong/1/0") == 404
    assert asked(f"gradio_api/file={root / 'a.safetensors'}") in (403, 404)
