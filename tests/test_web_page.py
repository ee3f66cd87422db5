"""The real page in a headless browser, where gradio, playwright and chromium are."""

# ruff: noqa: F401, F811 (fixtures of tests.make.web)

import contextlib
import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import demo.web.__main__ as program
from demo.shapes import NAMES
from demo.web import session as do
from demo.web.session import Model, demo_examples
from model.predict.text_predictor import TextPredictor
from tests.make.web import at_root, example, model, query, save


@contextlib.contextmanager
def served(model: Model) -> Iterator[str]:
    """The address of the page over a model."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (requirements.txt, optional)")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in program.OFFLINE.items():
            patch.setenv(name, value)
        from demo.web import page

        app = page.build(model, list(demo_examples([1, 2])))
        yield page.launch(app, "127.0.0.1", None)
        app.close(verbose=False)


@pytest.fixture(scope="module")
def address(model: Model) -> Iterator[str]:
    with served(model) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed (requirements.txt, optional)")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address: str) -> Iterator:  # noqa: ANN001
    """A user's page; at the end: it has asked for nothing from elsewhere, and no script of it has failed."""
    asked, failed = [], []
    user = browser.new_context(viewport={"width": 1400, "height": 900}).new_page()
    user.on("request", lambda request: asked.append(request.url))
    user.on("pageerror", lambda error: failed.append(error))
    user.goto(address)
    user.get_by_role("button", name="Find it").wait_for()
    yield user
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == [] and failed == []
    user.context.close()


@pytest.mark.parametrize("text", [True, False])
def test_steps_that_have_an_effect(text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name has a column where the model reads it; the steps are numbered without gaps."""
    pytest.importorskip("gradio")
    from demo.web import page

    shown = page.build(Model(SimpleNamespace(takes_text=text), "about"), list(demo_examples([6])))
    parts = [part["props"] for part in shown.config["components"]]
    columns = [props["visible"] for props in parts if "card" in (props.get("elem_classes") or [])]
    assert columns == [True, text, True, True]
    said = [props["value"] for props in parts if "step" in (props.get("elem_classes") or [])]
    numbers = [int(re.search(r"<span>(\d)</span>", value).group(1)) for value in said]
    assert numbers == ([1, 2, 3, 4] if text else [1, 2, 2, 3])  # that of the hidden column is not seen


def find(page) -> None:  # noqa: ANN001
    page.get_by_role("button", name="Find it").click()
    page.locator(".result img, .wrong").first.wait_for()


def find_what_is_drawn(page, start: tuple[float, float], end: tuple[float, float]) -> None:  # noqa: ANN001
    """Drag over the example, points as fractions of it, search, and clear the drawing."""
    box = page.locator(".painter canvas").bounding_box()
    at, to = ((box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end))
    page.mouse.move(*at)
    page.mouse.down()
    page.mouse.move(*to, steps=5)
    page.mouse.up()
    page.get_by_role("button", name="Find it").click()
    page.locator(".result img").wait_for()
    page.get_by_role("button", name="Clear").click()


@pytest.mark.slow
def test_example_predict_threshold(page) -> None:  # noqa: ANN001
    page.get_by_role("button", name="star").click()
    page.locator(".painter img[src]").wait_for()
    find(page)
    assert page.locator(".maps img").count() == 5 and page.locator(".wrong").count() == 0
    assert all(page.locator("figure img").evaluate_all("found => found.map(x => x.complete && x.naturalWidth > 0)"))
    before = page.locator(".result figcaption").inner_text()
    page.get_by_label("number input for threshold").fill("0.99")
    page.wait_for_function("text => document.querySelector('.result figcaption').innerText != text", arg=before)
    assert "nothing" in page.locator(".result figcaption").inner_text()


@pytest.mark.slow
def test_upload_paint_and_messages(page, example: do.Example, query: str, tmp_path: Path) -> None:  # noqa: ANN001
    (tmp_path / "text.png").write_text("hello")
    page.locator("#photo input[type=file]").set_input_files(tmp_path / "text.png")
    page.get_by_text("text.png: not an image").wait_for()
    assert page.get_by_text("Error").count() == 0
    page.locator("#photo input[type=file]").set_input_files(save(tmp_path / "a.png", example.support.photo.image))
    page.locator(".painter img[src]").wait_for()
    page.locator("#query input[type=file]").set_input_files(query)
    page.get_by_label("class name").fill("star")
    find(page)
    page.get_by_text("where is the object").wait_for()
    find_what_is_drawn(page, (0.4, 0.5), (0.6, 0.5))
    page.get_by_role("button", name="Find it").click()
    page.get_by_text("nothing is painted").wait_for()
    assert page.locator(".result img").count() == 0
    page.get_by_role("button", name="Box").click()
    find_what_is_drawn(page, (0.2, 0.2), (0.7, 0.8))
    page.locator("#mask").locator("xpath=..").locator("input[type=file]").set_input_files(tmp_path / "text.png")
    page.get_by_text("text.png: not an image").wait_for()
    page.get_by_role("button", name="Remove", exact=True).click()
    page.locator("#photo").wait_for()
    page.locator("#photo input[type=file]").set_input_files(tmp_path / "text.png")  # after a good one, too
    page.get_by_text("text.png: not an image").wait_for()
    assert page.get_by_text("Error").count() == 0


@pytest.mark.slow
def test_each_user_for_himself_and_narrow(page, browser, address: str) -> None:  # noqa: ANN001
    page.get_by_role("button", name="fish").click()
    page.locator(".painter img[src]").wait_for()
    other = browser.new_context(viewport={"width": 420, "height": 900}).new_page()
    other.goto(address)
    find(other)
    other.get_by_text("choose the picture to search").wait_for()
    assert other.evaluate("document.documentElement.scrollWidth") <= 420
    find(page)
    assert page.locator(".result img").count() == 1
    assert other.locator(".result img").count() == 0
    other.context.close()


@pytest.mark.slow
def test_page_of_a_clip_alone(browser, query: str) -> None:  # noqa: ANN001
    """No place for an example; a name and a picture, then one of the demo's."""
    with served(Model(TextPredictor.from_clip("demo/clip", "cpu"), "CLIP alone", NAMES)) as address:
        user = browser.new_context(viewport={"width": 1400, "height": 900}).new_page()
        user.goto(address)
        user.locator("#query input[type=file]").set_input_files(query)
        find(user)
        user.get_by_text("give a text").wait_for()
        user.get_by_label("class name").fill("star")
        user.get_by_role("button", name="Find it").click()
        user.locator(".result img").wait_for()
        assert user.locator("#photo").count() == 0 and user.locator(".maps img").count() == 2
        user.get_by_role("button", name="fish").click()
        user.locator(".result .empty").wait_for()
        find(user)
        assert user.locator(".result img").count() == 1 and user.locator(".wrong").count() == 0
        user.context.close()
