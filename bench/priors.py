"""`python -m bench.priors`: CPU seconds of every prior for one 1-shot episode at PASCAL's sizes; those of VTP are the measure.

ResNet-50, ViT-B/16, side 473, one thread; random weights and random word vectors, since time does not depend on them. Nothing is
cached. What a decoder computes anyway (its stages of query and support) is not counted; a support that is masked before the
backbone (HDMNet) costs one more pass for priors that read its background, which is. The least of the repeats counts.
"""

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date

import torch
import torch.nn.functional as F

from bench.world import SIDE, episodes
from model.backbone import ImageEncoder, build_encoder
from model.clip import load_clip
from model.few_shot.map_prior import CellPrior, TextMapPrior
from model.few_shot.memo import Memo
from model.few_shot.prior import TEXT_MAPS, Features, TextPrior, View
from model.system import Frozen
from util.cache import TensorCache

NAMES = [f"class {i}" for i in range(20)]


class Given(TextMapPrior):
    """Random vectors in place of the words', which are made once for a run."""

    def use(self, names: Sequence[str], base: Sequence[int] = ()) -> None:
        self.names, self.words = tuple(NAMES), (*NAMES, *(f"background {i}" for i in range(26)))
        self.rows = dict(zip(self.words, F.normalize(torch.randn(46, self.clip.visual.visual.proj.shape[1]), dim=1), strict=True))
        self.base = range(5, 20)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Least CPU time of a call, after one to warm up."""
    times = []
    with torch.no_grad():
        for _ in range(1 + repeats):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--patches", default="timm:vit_small_patch16_dinov3", help="patch encoder beside the CNN")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    episode, clip = episodes(1), Frozen(load_clip("random"))
    own, patches = (Frozen(build_encoder(name, kind=ImageEncoder)) for name in ("resnet50", given.patches))
    with torch.no_grad():
        cells = [own.module.cells(images) for images in (episode.query, episode.support[0])]
    size = torch.zeros(1, 1, 60, 60)
    features = Features(View(middle=size, cells=cells[0]), View(cells=cells[1]), episode.support_mask.float(), 1,
                        Memo(TensorCache(0), ""))  # fmt: skip
    vtp = TextPrior(clip, F.normalize(torch.randn(40, 512), dim=1), "base+target", range(6, 21))
    rows = {"`vtp`": lambda: vtp(episode, features)}
    for name in ("contrast", "mutual", "regions"):
        prior, beside = CellPrior(name, own.module, own=True), CellPrior(name, patches.module, own=False)
        rows[f"`{name}`"] = lambda prior=prior: prior(episode, features)
        if name == "contrast":
            twice = lambda prior=prior: (own.module.cells(episode.support[0]), prior(episode, features))  # noqa: E731
            rows[f"`{name}`, masked support"] = twice
        rows[f"`{name}`, {given.patches}"] = lambda beside=beside: beside(episode, features)
    for name in TEXT_MAPS:
        prior = Given(name, clip.module, patches.module, NAMES, "base+target", range(6, 21))
        rows[f"`{name}`" + (f", {given.patches}" if name == "proxyclip" else "")] = lambda prior=prior: prior(episode, features)
    print(f"## {date.today()}, 1 CPU thread ({platform.machine()}), torch {torch.__version__}, fp32, `python -m bench.priors`\n")
    print(f"One episode, 1-shot, side {SIDE}.\n\n| prior | cpu-s | of VTP's |\n|---|---|---|")
    first = None
    for name, call in rows.items():
        spent = seconds(call, given.repeats)
        first = first or spent
        print(f"| {name} | {spent:.2f} | {spent / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
