"""One episode of the demo with its priors, as docs/glossary.md shows it: `python -m demo.picture [FILE]`.

CLIP's priors are training-free, so this needs no trained weights.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from demo.world import ensure
from model import configure, open_system
from model.build import initialise
from util import cli
from util.data.episodes import Episode
from util.files import atomic
from util.report.viz import COLOURS, Panel, contact_sheet, heatmap, overlay

CONFIG = "config/demo/demo_split0_resnet50.yaml"
NUMBER = 84  # of the episode


def panels(episode: Episode, maps: dict[str, Tensor]) -> list[Panel]:
    """Supports with their masks, the query, its priors, the answer.

    Args:
        episode: a batch of one.
        maps: name -> 1 C h w, or 1 K C h w; channels are averaged.
    """
    query, masks = _image(episode.query[0]), episode.support_mask[0].numpy()
    shots = [overlay(_image(image), mask, COLOURS["support mask"]) for image, mask in zip(episode.support[0], masks, strict=True)]
    return [
        *((f"support, shot {k} of {len(shots)}", shot) for k, shot in enumerate(shots, start=1)),
        ("query", query),
        *((f"prior: {name.upper()}", heatmap(values.flatten(1, -3).mean(1)[0].numpy(), query)) for name, values in maps.items()),
        ("truth, to be predicted", overlay(query, episode.query_mask[0].numpy(), COLOURS["truth"])),
    ]


def _image(image: Tensor) -> np.ndarray:
    """3 S S float 0..255 -> S S 3 uint8."""
    return image.permute(1, 2, 0).numpy().round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default="docs/episode.jpg")
    file = parser.parse_args().file
    config = configure(CONFIG, "PI_CLIP", ["Train.shot=2", "Test_Finetune.protocol=strict"])
    ensure(config.Data.data_root)
    system, source = open_system("PI_CLIP", config)
    initialise(system.encoder, config.Method.backbone_weight)
    episode = source.validation().data[NUMBER]
    system.eval()
    features = system.features(episode)
    shown = panels(episode, system.prior_maps(episode, features))
    sheet = contact_sheet([shown[:3], shown[3:]], height=200)
    jpeg = cv2.imencode(".jpg", sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
    with atomic(file) as temporary:
        temporary.write_bytes(jpeg)
    print(f"{file}: {source.names.names[int(episode.cls) - 1]} in {episode.query_name[0]}, {len(jpeg) / 1000:.0f} kB")


if __name__ == "__main__":
    cli.run(main)
