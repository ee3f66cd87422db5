"""`python -m demo.train_clip`: trains the tiny CLIP of the demo, demo/clip/{config.json, model.safetensors}.

The architecture is CLIP ViT-B/16's, narrow: patch 8, 8 blocks, width 96. A vision transformer of that size learns next to
nothing from a few thousand scenes on its own, so three things help it on a CPU (0.6 s a step on two cores):

1. The text tower comes first. It learns a small grammar, "a photo of a.", "a photo of a and b.", "a photo without a.",
   onto fixed directions; the image tower is then trained against the texts.
2. Attention starts as a 3 x 3 convolution: each head looks at one neighbour through sine positions.
3. Every patch token learns from the demo's ResNet (`demo.train_backbone`) what is at its place, shallow blocks from shallow
   stages, deep ones from deep stages (FitNets).

Both the class token and the mean of the patch tokens are matched with the texts, since PI-CLIP's text prior pools patches.
Scenes are fresh ones, in neither list. `--evaluate` prints zero-shot accuracy on the scenes of the val list.
"""

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from demo.shapes import NAMES
from demo.train_backbone import FILE as BACKBONE
from demo.world import FRESH, VAL, Scene, scene
from model.backbone import build_encoder
from model.clip.load import clip_tensors, load_clip
from model.clip.text import BACKGROUND, FOREGROUND
from model.clip.trunk import ClipTrunk
from util.files import load_state, save_json, save_tensors

FOLDER = Path("demo/clip")
PATCH, WIDTH, HEADS, BLOCKS, EMBED, SIDE = 8, 96, 8, 8, 64, 16  # SIDE: patches of a side in the stored positional grid
CONFIG = {
    "embed_dim": EMBED, "quick_gelu": True,
    "vision_cfg": {"image_size": SIDE * PATCH, "layers": BLOCKS, "width": WIDTH, "head_width": WIDTH // HEADS,
                   "patch_size": PATCH},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}  # fmt: skip
SCALE = 20.0  # of the logits
FREQUENCIES = (0.3, 0.8, 1.6)  # radians per patch
POSITIONS = 4 * len(FREQUENCIES)  # leading channels that hold the position
RADIUS = (1, 1, 2, 1, 2, 1, 3, 2)  # how far the heads of each block look at first
TEACHERS = {1: 1, 3: 2, 5: 3, 7: 4}  # block -> stage of the ResNet it learns from


@dataclass(frozen=True)
class View:
    """What the image tower is shown in a step."""

    patches: int  # a side of the window
    zoom: tuple[float, float]  # log of the magnification
    centred: bool  # on a thing, else on the scene
    batch: int
    taught: bool  # by the ResNet, too


CROPS = View(8, (-0.2, 0.4), True, 128, True)
SCENES = View(SIDE, (-0.35, 0.3), False, 32, False)
VIEWS = (CROPS, CROPS, CROPS, SCENES)  # in turn; both take the same time
STEPS, RATE = 4000, 2e-3

PAIRS = list(permutations(range(len(NAMES)), 2))
TEXTS = [FOREGROUND.format(n) for n in NAMES] + [BACKGROUND.format(n) for n in NAMES]
TEXTS += [FOREGROUND.format(f"{NAMES[a]} and {NAMES[b]}") for a, b in PAIRS]


# --- text -------------------------------------------------------------------------------------------------------------


def text_directions() -> Tensor:
    """Where each text belongs, len(TEXTS) EMBED, L2-normalised: a class direction, its opposite, or the sum of two."""
    basis = torch.linalg.qr(torch.randn(EMBED, EMBED, generator=torch.Generator().manual_seed(3)))[0]
    cls, common = basis[: len(NAMES)], basis[len(NAMES)]
    a, b = torch.tensor(PAIRS).T
    return F.normalize(torch.cat([cls + 0.5 * common, 0.8 * common - cls, cls[a] + cls[b] + 0.5 * common]), dim=-1)


def train_text(clip: CLIP, steps: int = 400, rate: float = 3e-3) -> None:
    """Teaches the text tower the grammar."""
    tokens, target = SimpleTokenizer()(TEXTS), text_directions()
    parameters = [p for name, p in clip.named_parameters() if not name.startswith(("visual", "logit"))]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
        rows = torch.cat([torch.arange(2 * len(NAMES)), torch.randint(2 * len(NAMES), len(TEXTS), (56,))])
        loss = 1 - (clip.encode_text(tokens[rows], normalize=True) * target[rows]).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"text tower: mean cosine with its directions {1 - loss.item():.3f}", flush=True)


# --- image ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def start_as_convolution(clip: CLIP, sharpness: float = 8.0) -> None:
    """Sine positions in the first channels; head h of each block attends to neighbour h; content never writes there."""
    visual, omega, n = clip.visual, torch.tensor(FREQUENCIES), len(FREQUENCIES)
    y, x = torch.meshgrid(torch.arange(SIDE).float(), torch.arange(SIDE).float(), indexing="ij")
    waves = [f(axis.flatten()[:, None] * omega) for axis in (y, x) for f in (torch.sin, torch.cos)]
    visual.positional_embedding.zero_()
    visual.positional_embedding[1:, :POSITIONS] = 1.4 * torch.cat(waves, 1)
    visual.class_embedding.mul_(0.1)
    visual.conv1.weight[:POSITIONS] = 0
    neighbours = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    for radius, block in zip(RADIUS, visual.transformer.resblocks, strict=True):
        weight, size = block.attn.in_proj_weight, WIDTH // HEADS
        weight[: 2 * WIDTH] *= 0.1
        for head, offset in enumerate(neighbours):
            turn = torch.zeros(POSITIONS, POSITIONS)  # sin(w (p + d)) and cos(w (p + d)) from those of p
            for axis, distance in enumerate(offset):
                angle = omega * distance * radius
                sin, cos = (slice(2 * n * axis + n * k, 2 * n * axis + n * (k + 1)) for k in (0, 1))
                turn[sin, sin] = turn[cos, cos] = torch.diag(angle.cos())
                turn[sin, cos], turn[cos, sin] = torch.diag(angle.sin()), -torch.diag(angle.sin())
            weight[head * size : (head + 1) * size, :POSITIONS] += sharpness**0.5 * turn
            weight[WIDTH + head * size : WIDTH + (head + 1) * size, :POSITIONS] += sharpness**0.5 * torch.eye(POSITIONS)
        block.attn.in_proj_bias.zero_()
        block.attn.out_proj.weight[:POSITIONS] = 0
        block.mlp.c_proj.weight[:POSITIONS] = 0


def window(made: Scene, rng: np.random.Generator, view: View) -> tuple[np.ndarray, np.ndarray]:
    """A square of the scene: (image uint8 RGB, pixels of each class in each patch, patches**2 x 20)."""
    patches, side = view.patches, view.patches * PATCH
    h, w = made.label.shape
    _, left, top, right, bottom = made.boxes[rng.integers(len(made.boxes))]
    centre = np.array([(left + right) / 2, (top + bottom) / 2] if view.centred else [w / 2, h / 2])
    turn = np.radians(rng.uniform(-15, 15))
    matrix = np.exp(rng.uniform(*view.zoom)) * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix[:, 0] *= rng.choice([-1, 1])
    shift = side * (0.5 + rng.uniform(-0.15, 0.15, 2)) - matrix @ centre
    full = np.concatenate([matrix, shift[:, None]], 1)
    image = cv2.warpAffine(made.image, full, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    label = cv2.warpAffine(made.label, full, (side, side), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
    cells = label.reshape(patches, PATCH, patches, PATCH).swapaxes(1, 2).reshape(patches**2, -1, 1)
    return image[..., rng.permutation(3)], (cells == np.arange(1, len(NAMES) + 1)).sum(1)


class Student(nn.Module):
    """The image tower with the linear heads that read the teacher's stages off its blocks."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.trunk = ClipTrunk(clip.visual)
        self.teacher = build_encoder("resnet50", 16).eval().requires_grad_(False)
        self.teacher.load_weights(load_state(BACKBONE), str(BACKBONE))
        self.heads = nn.ModuleDict({str(b): nn.Linear(WIDTH, self.teacher.channels[s]) for b, s in TEACHERS.items()})
        self.statistics: dict[int, tuple[Tensor, Tensor]] = {}

    def lessons(self, images: Tensor, patches: int) -> dict[int, Tensor]:
        """Standardised features of the teacher at each patch, B patches**2 C, by block."""
        stages = self.teacher(images.float())
        out = {}
        for block, stage in TEACHERS.items():
            features = F.adaptive_avg_pool2d(stages[stage], patches).flatten(2).transpose(1, 2)
            if block not in self.statistics:
                self.statistics[block] = features.mean((0, 1)), features.std((0, 1)) + 0.01 * features.std()
            mean, std = self.statistics[block]
            out[block] = ((features - mean) / std).clamp(-4, 4)
        return out

    def forward(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, dict[int, Tensor]]:
        """Final tokens after ln_post, and what the heads say; the positions are a random part of a random grid."""
        x = self.trunk.visual.conv1(self.trunk.normalise(images))
        B, C, h, w = x.shape
        grid = [int(rng.integers(max(side, 14), 21)) for side in (h, w)]
        top, left = (int(rng.integers(outer - side + 1)) for outer, side in zip(grid, (h, w), strict=True))
        table = self.trunk.position(grid)
        part = table[1:].view(*grid, C)[top : top + h, left : left + w].reshape(-1, C)
        cls = self.trunk.visual.class_embedding.expand(B, 1, -1)
        tokens = torch.cat([cls, x.flatten(2).transpose(1, 2)], 1) + torch.cat([table[:1], part])
        run = self.trunk.run(self.trunk.visual.ln_pre(tokens), keep_hidden=TEACHERS)
        said = {b: self.heads[str(b)](F.layer_norm(run.hidden[b][:, 1:], (WIDTH,))) for b in TEACHERS}
        return self.trunk.post_norm(run.tokens), said


def losses(tokens: Tensor, projection: Tensor, pixels: Tensor, texts: Tensor) -> tuple[Tensor, float]:
    """Match of class token, mean patch and single patches with "a photo of c." / "a photo without c."; accuracy."""
    pooled = torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)], 1) @ projection
    of, without = (SCALE * F.normalize(pooled, dim=-1) @ texts.T).chunk(2, -1)  # B 2 20 each
    area = pixels.sum(1)
    share = area * (area >= 60)
    share = (share / share.sum(1, keepdim=True).clamp(min=1))[:, None]
    named = -(of.log_softmax(-1) * share).sum(-1).mean()
    there, absent = (area >= 60)[:, None].expand_as(of), (area < 5)[:, None].expand_as(of)
    presence = F.softplus(without - of)[there].mean() + F.softplus(of - without)[absent].mean()

    of, without = (SCALE * F.normalize(tokens[:, 1:] @ projection, dim=-1) @ texts.T).chunk(2, -1)  # B n 20
    inside = pixels.amax(-1) > PATCH**2 // 3
    local = F.cross_entropy(of[inside], pixels[inside].argmax(-1))
    outside = F.softplus(of - without)[pixels.sum(-1) == 0].mean()
    right = (pooled[:, 1] @ texts[: len(NAMES)].T).argmax(-1) == area.argmax(-1)
    return 2 * named + 0.5 * presence + local + 0.25 * outside, right.float().mean().item()


def train_image(clip: CLIP, scenes: list[Scene], rng: np.random.Generator, steps: int, rate: float) -> None:
    """Crops and scenes in turn, under one cosine schedule; the stored weights are renewed every few minutes."""
    student, texts = Student(clip), text_directions()[: 2 * len(NAMES)]
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if (p.ndim > 1) == matrix], "weight_decay": 0.05 * matrix}
              for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    started, recent = time.monotonic(), {view: [] for view in VIEWS}
    for step in range(steps):
        view, done = VIEWS[step % len(VIEWS)], step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        rows = [window(scenes[rng.integers(len(scenes))], rng, view) for _ in range(view.batch)]
        images = torch.from_numpy(np.stack([image for image, _ in rows])).permute(0, 3, 1, 2)
        pixels = torch.from_numpy(np.stack([cells for _, cells in rows])).float()
        tokens, said = student(images, rng)
        loss, accuracy = losses(tokens, clip.visual.proj, pixels, texts)
        recent[view].append((loss.item(), 100 * accuracy))
        if view.taught:
            lessons = student.lessons(images, view.patches)
            loss = (0.3 + 0.5 * done) * loss + (1 - 0.5 * done) * sum(F.mse_loss(said[b], lessons[b]) for b in lessons)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            shown = []
            for name, seen in (("crops", CROPS), ("scenes", SCENES)):
                value, right = np.mean(recent[seen], 0)
                shown.append(f"{name}: loss {value:.3f}, main thing named right {right:.1f} %")
            recent = {view: [] for view in VIEWS}
            print(f"{step + 1}/{steps}  {'  '.join(shown)}  {time.monotonic() - started:.0f} s", flush=True)
        if (step + 1) % 500 == 0:
            save(clip)


# --- files and figures --------------------------------------------------------------------------------------------------


def save(clip: CLIP) -> None:
    """Only the embedding rows of words that occur; half precision."""
    ids = SimpleTokenizer()(TEXTS).unique().tolist()
    state = {key: value.half() for key, value in clip.state_dict().items() if key != "attn_mask"}
    state["token_embedding.rows"] = state.pop("token_embedding.weight")[ids]
    state["token_embedding.ids"] = torch.tensor(ids, dtype=torch.int32)
    save_tensors(FOLDER / "model.safetensors", state)
    save_json(FOLDER / "config.json", CONFIG)


@torch.no_grad()
def evaluate(numbers: range = VAL) -> dict[str, float]:
    """Zero-shot accuracy on held-out scenes: is the text of the best "a photo of c." one of the things that are there?

    Scenes with a single thing have one right answer; the others are counted apart.
    """
    clip = load_clip(str(FOLDER))
    texts = clip.text([FOREGROUND.format(n) for n in NAMES])
    right: dict[str, list[bool]] = {}
    for made in map(scene, numbers):
        h, w = (-(-side // PATCH) * PATCH for side in made.label.shape)
        image = torch.from_numpy(cv2.resize(made.image, (w, h), interpolation=cv2.INTER_CUBIC)).permute(2, 0, 1)[None]
        tokens, _ = clip.visual.embed(clip.visual.normalise(image))
        tokens = clip.visual.post_norm(clip.visual.run(tokens).tokens)
        present = set(np.unique(made.label).tolist()) - {0, 255}
        kind = "one thing" if len(present) == 1 else "several things"
        for name, pooled in (("class token", tokens[:, 0]), ("mean patch", tokens[:, 1:].mean(1))):
            answer = int((pooled @ clip.visual.visual.proj @ texts.T).argmax()) + 1
            right.setdefault(f"{name}, {kind}", []).append(answer in present)
    return {key: sum(hits) / len(hits) for key, hits in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="only print the zero-shot accuracy of the stored CLIP")
    parser.add_argument("--continue", type=int, metavar="STEPS", dest="more", help="go on from the stored CLIP for STEPS")
    given = parser.parse_args()
    if not given.evaluate:
        torch.manual_seed(0)
        cv2.setNumThreads(1)
        with ProcessPoolExecutor() as pool:
            scenes = [s for s in pool.map(scene, range(FRESH, FRESH + 5000), chunksize=50) if s.boxes]
        clip = CLIP(EMBED, CLIPVisionCfg(**CONFIG["vision_cfg"]), CLIPTextCfg(**CONFIG["text_cfg"]), quick_gelu=True)
        rng = np.random.default_rng(1)
        if given.more:
            clip.load_state_dict(clip_tensors(load_clip(str(FOLDER))))
        else:
            clip.logit_scale.data.fill_(math.log(SCALE))
            train_text(clip)
            start_as_convolution(clip)
        train_image(clip, scenes, rng, given.more or STEPS, RATE)
        save(clip)
    for key, accuracy in sorted(evaluate().items()):
        print(f"zero-shot, {key}: {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
