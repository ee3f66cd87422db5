"""What the page does, without gradio; the page itself is tested in test_web_page.py."""

# ruff: noqa: F401, F811 (fixtures of tests.make.web)

import base64
import io
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import demo.web.__main__ as program
import env
from demo import world
from demo.web import session as do
from demo.web import show
from demo.web.session import Model, Session, Support, demo_examples
from model.predict.opening import NAMED
from model.predict.predictor import Predictor
from model.predict.text_predictor import TextPredictor
from tests.make import make
from tests.make.web import at_root, example, model, query, save
from util import cli
from util.data.transforms import IGNORE
from util.errors import UserError
from util.photos.reading import MAX_SIDE, Photo
from util.report.viz import COLOURS

STAR = 1  # class


def painted(mask: np.ndarray) -> dict:
    """As painter.js sends it."""
    file = io.BytesIO()
    Image.fromarray(np.dstack([np.full((*mask.shape, 3), 200, np.uint8), np.uint8(255) * (mask == 1)])).save(file, "PNG")
    return {"painted": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}


def test_the_examples_show_their_thing() -> None:
    for found in demo_examples([1, 2]):
        mask = found.support.mask
        assert (mask == 1).sum() >= do.EXAMPLE_PIXELS and mask.shape == found.support.photo.hw
        assert IGNORE in mask and found.query.shape != ()
        assert not np.array_equal(found.query, found.support.photo.image)


@pytest.mark.parametrize("way", ["example", "upload", "painted"])
def test_the_page_finds_what_the_predictor_finds(way: str, model: Model, example: do.Example, query: str, tmp_path: Path) -> None:
    image, mask = example.support.photo.image, example.support.mask
    if way == "painted":
        mask = np.where(mask == 1, 1, 0).astype(np.uint8)
    if way == "example":
        session, strokes = Session(support=example.support), None
    else:
        session = do.open_support(Session(), save(tmp_path / "a.png", image))
        strokes = painted(mask) if way == "painted" else None
        if way == "upload":
            label = Image.fromarray(mask, "P")
            label.putpalette(world.palette())
            label.save(tmp_path / "a_mask.png")
            session = do.open_mask(session, str(tmp_path / "a_mask.png"))
    found = do.segment(model, session, strokes, " star ", query).found
    model.predictor.set_support(image, Image.fromarray(mask, "P"), "star")
    expected = model.predictor.predict(query)
    assert np.array_equal(found.score, expected.score) and 0 < expected.mask.sum() < expected.mask.size
    assert np.array_equal(found.mask(0.5), expected.mask)
    assert found.maps.keys() == {"vtp", "vvp", "correlation"}


def test_large_uploads_are_reduced_once(model: Model, tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (900, 1300, 3), np.uint8)
    mask = np.zeros((900, 1300), np.uint8)
    mask[200:500, 300:700] = 7  # any value is the object
    session = do.open_support(Session(), save(tmp_path / "a.png", photo))
    session = do.open_mask(session, save(tmp_path / "m.png", mask))
    assert session.support.photo.hw == session.support.mask.shape == (443, MAX_SIDE)
    assert session.support.mask.mean() == pytest.approx(mask.astype(bool).mean(), abs=0.005)
    assert session.support.upload.image.base.size == 1  # the upload itself is not kept
    found = do.segment(model, session, None, "star", str(tmp_path / "a.png")).found
    assert found.score.shape == found.image.shape[:2] == (443, MAX_SIDE)


def test_the_threshold_needs_no_model(example: do.Example, query: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    found = do.segment(model, Session(support=example.support), None, "star", query).found
    monkeypatch.setattr(Predictor, "predict", None)
    low, middle, high = (found.mask(np.quantile(found.score, q)) for q in (0.1, 0.5, 0.9))
    assert low.sum() > middle.sum() > high.sum() > 0 and (low >= middle).all() and (middle >= high).all()
    pages = {show.result(found, t) + show.details(found, t) for t in (found.score.min(), found.score.mean(), 1)}
    assert len(pages) == 3 and "nothing" in show.result(found, 1)


def test_text_alone_is_the_text_prior(model: Model, query: str) -> None:
    found = do.segment(model, Session(), None, "star", query).found
    model.predictor.set_support(text="star")
    assert np.array_equal(found.score, model.predictor.predict(query).score) and list(found.maps) == ["vtp"]
    assert "text alone" in show.result(found, 0.5) and "Score" not in show.details(found, 0.5)


def test_clip_without_a_trained_network(query: str) -> None:
    model = Model(TextPredictor.from_clip("demo/clip", "cpu"), "CLIP alone")
    found = do.segment(model, Session(), None, "star", query).found
    assert np.array_equal(found.score, model.predictor.predict(query).score) and found.text_alone and not model.takes_supports
    with pytest.raises(UserError, match="give a text"):
        do.segment(model, Session(), None, "", query)


def wrong(path: Path, what: str) -> tuple[Session, tuple]:
    """A session and the arguments of `segment` that are wrong in some way."""
    photo = save(path / "a.png", np.full((40, 60, 3), 90, np.uint8))
    at_hand = do.open_support(Session(), photo)
    (path / "text.png").write_text("hello")
    match what:
        case "no query":
            return Session(), (None, "star", None)
        case "query is text":
            return Session(), (None, "star", str(path / "text.png"))
        case "query is gone":
            return Session(), (None, "star", str(path / "gone.png"))
        case "nothing at all":
            return Session(), (None, "", photo)
        case "no mask":
            return at_hand, (None, "star", photo)
        case "nothing painted":
            return at_hand, (painted(np.zeros((40, 60))), "star", photo)
        case "painted elsewhere":
            return at_hand, (painted(np.ones((4, 6))), "star", photo)
        case "painted no image":
            return at_hand, ({"painted": "data:image/png;base64,aGVsbG8="}, "star", photo)
        case "painted too long":
            return at_hand, ({"painted": "data:image/png;base64," + "A" * (do.MAX_PAINTED + 1)}, "star", photo)
        case "forgotten":
            return Session(), ({"photo": "data:image/jpeg;base64,"}, "star", photo)
        case "long name":
            return Session(), (None, "star " * 30, photo)
    raise AssertionError(what)


@pytest.mark.parametrize(("what", "says"), [
    ("no query", "choose the"), ("query is text", r"^text.png: not an image"), ("query is gone", "^no such file: gone.png"),
    ("nothing at all", "give a text"), ("no mask", "where is the object"), ("nothing painted", "nothing is painted"),
    ("painted elsewhere", "paint again"), ("painted no image", "paint again"), ("painted too long", "paint again"),
    ("forgotten", "load the page again"), ("long name", "149 characters"),
])  # fmt: skip
def test_wrong_input_gives_a_message(what: str, says: str, model: Model, tmp_path: Path) -> None:
    session, arguments = wrong(tmp_path, what)
    with pytest.raises(UserError, match=says) as caught:
        do.segment(model, session, *arguments)
    assert str(tmp_path) not in str(caught.value)


def test_wrong_uploads_give_a_message(tmp_path: Path) -> None:
    photo = np.full((40, 60, 3), 90, np.uint8)
    session = do.open_support(Session(), save(tmp_path / "a.png", photo))
    cases = {
        "size": (save(tmp_path / "small.png", np.ones((4, 6), np.uint8)), "small.png is 6 x 4 pixels, its photo a.png 60 x 40"),
        "empty": (save(tmp_path / "empty.png", np.zeros((40, 60), np.uint8)), "empty.png is empty"),
        "JPEG": (save(tmp_path / "lossy.jpg", np.ones((40, 60), np.uint8)), "lossless"),
    }  # fmt: skip
    for path, says in cases.values():
        with pytest.raises(UserError, match=f"^[a-z.]+.*{re.escape(says)}|^{re.escape(says)}"):
            do.open_mask(session, path)
    with pytest.raises(UserError, match="photo first"):
        do.open_mask(Session(), cases["size"][0])
    large = save(tmp_path / "large.png", np.zeros((1, do.MAX_UPLOAD_SIDE + 1), np.uint8))
    for action in (do.open_support, do.open_mask):
        with pytest.raises(UserError, match="large.png has 10001 x 1 pixels"):
            action(session, large)


def test_a_system_without_clip_takes_no_text_alone(tmp_path: Path, query: str) -> None:
    model = Model(Predictor.from_checkpoint(make(tmp_path, "PFENet")[1], "cpu"), "PFENet")
    assert not model.takes_text and model.takes_supports
    with pytest.raises(UserError, match="no text prior"):
        do.segment(model, Session(), None, "star", query)


def test_several_supports(model: Model, example: do.Example, query: str) -> None:
    session = Session(support=example.support)
    for count in range(1, do.MAX_SUPPORTS):
        session = do.keep(session, None)
        assert session.support is None and len(session.kept) == count
        session = do.replace(session, support=example.support)
    with pytest.raises(UserError, match="5 examples are the most"):
        do.keep(session, None)
    many, one = (do.segment(model, s, None, "star", query).found for s in (session, Session(support=example.support)))
    assert "5 supports for a 1-shot checkpoint" in many.notes[0]
    np.testing.assert_allclose(many.score, one.score, atol=1e-4)
    assert show.kept(session.kept).count("<img") == 4
    assert do.remove(do.remove(session)) == Session()


def test_users_do_not_mix() -> None:
    """Between one user's support and query no other user's support comes in."""

    class Slow:
        notes, takes_text, needs_masks = (), True, True
        support = None

        def set_support(self, images: list, masks: list, text: str) -> None:
            self.support = text
            threading.Event().wait(0.01)

        def predict(self, photo: Photo) -> object:
            return SimpleNamespace(score=self.support, maps={}, seconds=0)

    model, photo = Model(Slow(), "slow"), Photo(np.zeros((4, 4, 3), np.uint8), "a")
    support = Support(photo, photo, np.ones((4, 4), np.uint8))
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda i: model.find([support], f"user {i}", photo).score, range(24))
    assert list(found) == [f"user {i}" for i in range(24)]


def test_what_users_write_is_no_html() -> None:
    support = Support(*(2 * [Photo(np.zeros((40, 60, 3), np.uint8), "<b>'x")]), np.ones((40, 60), np.uint8))
    assert "<b>'x" not in show.kept([support]) + show.message("<b>'x")


def test_the_painter_shows_the_mask(example: do.Example) -> None:
    uri = show.painter(example.support)["mask"].partition(",")[2]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))
    assert np.array_equal(drawn[..., 3] == 255, example.support.mask == 1) and tuple(drawn[0, 0, :3]) == COLOURS["support mask"]


@pytest.mark.parametrize(("installed", "arguments", "says"), [
    (False, [], "-m pip install \"gradio>="), (True, ["--weights", "nothing"], "no such checkpoint: nothing"),
    (True, ["--weights", "demo"], "sh train.sh split0 demo 0"), (True, ["--clip", "no.pt"], "no file no.pt"),
    (True, ["--clip", "demo/clip", "--arch", "HDMNet"], "nothing of arch (HDMNet)"),
])  # fmt: skip
def test_what_is_missing_is_told(installed: bool, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    monkeypatch.setattr(program, "version", lambda _: "6.40.0" if installed else "0")
    monkeypatch.setitem(NAMED, "demo", "no/such/file")
    monkeypatch.setattr(sys, "argv", ["web", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.run(program.main)
    assert ended.value.code == 2 and says in capsys.readouterr().err
