"""Augmentations of the zero-shot systems: each one against its definition, and all of them from the generator alone."""

import cv2
import numpy as np
import pytest

from util.data.augment import LONG, SHARE, Colours, CropTransform, linear, resized, window
from util.data.episodes import generator
from util.errors import UserError

IMAGE = np.random.default_rng(0).integers(0, 256, (90, 130, 3)).astype(np.float32)


def picture() -> tuple[np.ndarray, np.ndarray]:
    """An image whose red channel is its label times 20, in blocks of 10 pixels."""
    label = np.random.default_rng(1).integers(0, 6, (9, 13)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
    image = IMAGE.copy()
    image[..., 0] = 20.0 * label
    return image, label


def test_sides_keep_their_ratio_and_two_limits() -> None:
    assert resized((500, 375), 1.0, 512) == (683, 512)  # VOC's usual image
    assert resized((375, 500), 0.5, 512) == (256, 341)
    assert resized((1000, 100), 1.0, 64) == (LONG * 64, 26)  # the longer side is the limit
    for ratio in np.linspace(0.5, 2, 7):
        width, height = resized((640, 480), ratio, 512)
        assert abs(min(width, height) - 512 * ratio) <= 1 and abs(width / height - 4 / 3) < 0.01


def test_what_is_cut_out_and_filled_up() -> None:
    image, label = picture()
    sizes, filled_up, mirrored = [], 0, 0
    for i in range(40):
        out, clean, (cut, shown) = CropTransform(64)(generator(1, i), image, [label, np.zeros_like(label)])
        assert out.shape == clean.shape == (64, 64, 3) and out.dtype == clean.dtype == np.float32 and cut.dtype == np.uint8
        outside = shown == 255
        assert (cut[outside] == 255).all() and (out[outside] == 0).all() and (clean[outside] == 0).all()
        rows, columns = np.flatnonzero(~outside.all(1)), np.flatnonzero(~outside.all(0))
        assert rows[0] == columns[0] == 0 and not outside[: rows[-1] + 1, : columns[-1] + 1].any()  # at the top left
        filled_up += outside.any()
        inside = np.abs(clean[..., 0] - 20.0 * cut)[~outside]  # image and label went the same way, but for blurred edges
        assert np.median(inside) == 0 and (inside == 0).mean() > 0.4
        sizes.append((~outside).sum())
        plain = CropTransform(64, (1, 1))
        straight = plain(generator(2, i), image, [label])[1]
        turned = cv2.flip(straight, 1)
        small = cv2.resize(image.astype(np.uint8), resized((130, 90), 1, 64))
        lefts = range(small.shape[1] - 63)
        found = [np.array_equal(x, small[:64, left : left + 64]) for x in (straight, turned) for left in lefts]
        assert any(found)
        mirrored += any(found[len(found) // 2 :])
    assert 5 < filled_up < 35 and 8 < mirrored < 32


def test_crops_that_one_class_fills_are_drawn_again() -> None:
    label = np.full((40, 80), 3, np.uint8)
    label[:, 40:] = 7
    label[:, :10] = 255
    corners = np.array([[0, 0.0], [0.5, 0.9], [0.2, 0.38], [0, 0.5], [0, 0.99]])  # 3, 7, nearly 3, both, 7
    lefts = [int(c * 61) for c in corners[:, 1]]
    shares = [(label[:20, left : left + 20] == 3).mean() for left in lefts]
    assert shares[0] == 0.5 and shares[1] == 0 and SHARE < shares[2] < 1 and 1 - SHARE < shares[3] < SHARE
    assert window(label, 20, corners) == (0, lefts[3])
    assert window(label, 20, corners[:3]) == (int(0.2 * 21), lefts[2])  # none of them: the last draw
    assert window(label, 99, corners) == (0, 0)  # smaller than the window


def draws(**wanted: bool) -> Colours:
    """Colours of which just these steps act."""
    for i in range(10_000):
        found = Colours(generator(3, i))
        acting = {name: getattr(found, name) is not None for name in ("brightness", "contrast", "saturation", "hue")}
        if acting == {name: wanted.get(name, False) for name in acting}:
            return found
    raise AssertionError(wanted)


def test_colours() -> None:
    image = IMAGE.astype(np.uint8)
    assert np.array_equal(draws()(image), image)

    found = draws(brightness=True)
    assert np.array_equal(found(image), np.clip(IMAGE + np.float32(found.brightness), 0, 255).astype(np.uint8))
    assert 1 < abs(found.brightness) <= 32
    found = draws(contrast=True)
    assert np.array_equal(found(image), np.clip(IMAGE * np.float32(found.contrast), 0, 255).astype(np.uint8))

    found, hsv = draws(saturation=True), cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = np.clip(hsv[..., 1] * np.float32(found.saturation), 0, 255).astype(np.uint8)
    assert np.array_equal(found(image), cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))

    found, hsv = draws(hue=True), cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int64) + found.hue) % 180
    assert np.array_equal(found(image), cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)) and -18 <= found.hue < 18

    grey = np.full((4, 4, 3), 100, np.uint8)  # saturation and hue leave grey alone
    assert np.array_equal(draws(saturation=True)(grey), grey) and np.array_equal(draws(hue=True)(grey), grey)
    both = draws(contrast=True, saturation=True)
    first = cv2.cvtColor(linear(image, both.contrast) if both.contrast_first else image, cv2.COLOR_RGB2HSV)
    first[..., 1] = linear(first[..., 1], both.saturation)
    first = cv2.cvtColor(first, cv2.COLOR_HSV2RGB)
    assert np.array_equal(both(image), first if both.contrast_first else linear(first, both.contrast))


def test_how_often_each_step_acts() -> None:
    found = [Colours(generator(4, i)) for i in range(400)]
    for name in ("brightness", "contrast", "saturation", "hue"):
        values = [value for c in found if (value := getattr(c, name)) is not None]
        assert 150 < len(values) < 250
    assert 150 < sum(c.contrast_first for c in found) < 250
    factors = [c.contrast for c in found if c.contrast is not None]
    assert 0.5 <= min(factors) < 0.55 and 1.45 < max(factors) <= 1.5


def test_the_generator_alone_decides() -> None:
    image, label = picture()
    one, same, other = (CropTransform(48)(generator(5, i), image, [label]) for i in (1, 1, 2))
    assert np.array_equal(one[0], same[0]) and np.array_equal(one[2][0], same[2][0]) and not np.array_equal(one[0], other[0])
    assert np.array_equal(image, picture()[0])  # what came in is as it was
    used, fresh = generator(6), generator(6)
    CropTransform(48)(used, image, [label])
    CropTransform(48)(fresh, image[:40, :30], [label[:40, :30]])
    assert used.random() == fresh.random()  # as many numbers, whatever the image
    with pytest.raises(UserError, match="scale_min"):
        CropTransform(48, (2, 1))
