"""CLIP-RC against its plain form in the same minutes: seconds of a crop and of a training step, FLOP/s, equal numbers.

    python -m bench.clip_rc [VOC COCO-Stuff] [--side 512] [--batch 1] [--repeats 3] [--device cpu]

ViT-B/16 with random weights, since time does not depend on them, and made-up images. Plain is as the paper and the published code
read: attention maps written out, text, image and region vectors repeated for each token and then projected, a score map for every
region and class and then their mean, the recovery decoder also where its loss has no weight, focal loss on a one-hot target.
Fast and plain take turns; the table shows medians, seconds of processor time (of all threads). FLOP are those of the plain form,
whichever runs.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.clip import load_clip
from model.ops import resize
from model.system import Frozen
from model.zero_shot.clip_rc import CLIP_RC, REGIONS, Head
from model.zero_shot.decoder import Block
from model.zero_shot.losses import ALPHA, GAMMA
from model.zero_shot.tower import reading_mask
from util.config import Train

SQUARE = 2048
SIZES = {"VOC": (10, 20, 15), "COCO-Stuff": (100, 171, 156)}  # prompts, classes, seen classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["VOC"], metavar=" ".join(SIZES))
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1, help="of the training step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    square = torch.randn(SQUARE, SQUARE, device=device)
    able = 2 * SQUARE**3 / min(seconds(lambda: square @ square, device) for _ in range(4))
    print(f"## {date.today()}, {hardware} ({platform.machine()}), torch {torch.__version__}, fp32, `python -m bench.clip_rc`\n")
    print(f"Side {given.side}. A matrix product reaches {able / 1e9:,.0f} GFLOP/s.\n")
    print("| sizes of | what | GFLOP | s plain | s fast | ratio | GFLOP/s of fast | differs by |\n" + 8 * "|---" + "|")
    for name in given.sizes:
        system, plain = build(*SIZES[name], device)
        images = 255 * torch.rand(given.batch, 3, given.side, given.side, device=device)
        label = torch.randint(SIZES[name][1], (given.batch, given.side // 16, given.side // 16), device=device)
        label = label.repeat_interleave(16, 1).repeat_interleave(16, 2).to(torch.uint8)
        whole = torch.tensor([[0, given.side, 0, given.side]] * given.batch, device=device)
        batch = SimpleNamespace(image=images, label=label, valid=whole, name=["made up"] * given.batch)
        for what, of in (("forward of a crop", crop), (f"training step of {given.batch}", step)):
            fast, slow = of(system, batch), of(plain, batch)
            differs = max(relative(a, b) for a, b in zip(fast(), slow(), strict=True))  # warms up, too
            with FlopCounterMode(display=False) as counter:
                slow()
            pairs = [[seconds(call, device) for call in (slow, fast)] for _ in range(given.repeats)]
            a, b = map(statistics.median, zip(*pairs, strict=True))
            work = counter.get_total_flops()
            print(f"| {name} | {what} | {work / 1e9:,.0f} | {a:.2f} | {b:.2f} | **{a / b:.2f}** | {work / b / 1e9:,.0f} "
                  f"| {differs:.0e} |", flush=True)  # fmt: skip


def build(prompts: int, classes: int, seen: int, device: torch.device) -> tuple[CLIP_RC, CLIP_RC]:
    """The system and its plain form, with the same weights; without dropout, so that their numbers can be compared."""
    clip, systems = Frozen(load_clip("random")), []
    for form in (Head, Plain):
        torch.manual_seed(0)
        texts = F.normalize(torch.randn(classes, 512), dim=1)
        CLIP_RC.Head = form
        names = [f"class {c}" for c in range(classes)]
        systems.append(CLIP_RC(clip, names, texts, range(seen), CLIP_RC.Options(prompts=prompts, dropout=0.0)).to(device))
    CLIP_RC.Head = Head
    systems[1].losses = lambda batch: plain_losses(systems[1], batch)
    return tuple(systems)


def crop(system: CLIP_RC, batch: SimpleNamespace) -> Callable[[], list[Tensor]]:
    """Scores of one crop with all classes."""
    def run() -> list[Tensor]:
        with torch.no_grad():
            return [system.eval().scores(batch.image[:1])]

    return run


def step(system: CLIP_RC, batch: SimpleNamespace) -> Callable[[], list[Tensor]]:
    """Losses, and gradients of the prompts; AdamW runs with a rate of 0, so that the weights stay."""
    optimizer = system.optimizer(Train(base_lr=0.0, weight_decay=0.0))

    def run() -> list[Tensor]:
        losses = system.train().losses(batch)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()
        return [*(x.detach() for x in losses.values()), system.trained.prompts.deep_prompt_embeddings.grad]

    return run


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Processor time, which other work on the machine changes little; on a GPU the time that passes."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# The plain form.


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
    """B N D, B M D, B M D -> B N D; every probability is written out. mask: N M, added to the scores."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)


def read(block: Block, target: Tensor, memory: Tensor) -> Tensor:
    """A decoder block."""
    part = block.multihead_attn
    target = block.norm2(target + part.proj(attention(part.q(target), part.k(memory), part.v(memory), part.heads)))
    return block.norm3(target + block.linear2(block.linear1(target).relu()))


class Plain(Head):
    """CLIP-RC's head with the same weights."""

    def forward(self, trunk: nn.Module, images: Tensor, texts: Tensor) -> SimpleNamespace:
        whole, patches, regions, grid = self.tower(trunk, images)
        B, R, C, N = len(images), REGIONS**2, len(texts), patches.shape[1]
        # One descriptor for each region and class, and one input for each patch, before any projection.
        anchors = (regions + whole[:, None])[:, :, None].expand(B, R, C, -1)
        repeated = texts.expand(B, R, C, -1)
        descriptor = torch.cat([anchors * repeated, repeated], -1).flatten(1, 2)
        near = resize(regions.transpose(1, 2).unflatten(2, (REGIONS, REGIONS)), grid, corners=False).flatten(2).transpose(1, 2)
        merged = torch.cat([near, whole[:, None].expand(B, N, -1), patches], -1)
        classes, tokens = self.q_proj(descriptor), self.lateral_proj(merged)
        for of_classes, of_patches in zip(self.decoder_q.layers, self.decoder_v.layers, strict=True):
            classes, tokens = read(of_classes, classes, tokens), read(of_patches, tokens, classes)
        logits = (classes @ tokens.transpose(1, 2)).unflatten(1, (R, C)).mean(1)
        extra = {}
        if self.training:
            decoder = self.recovery
            a, b = decoder.linear_q_in(classes), decoder.linear_k_in(tokens)
            a, b = read(decoder.decouple_q[0], a, b), read(decoder.decouple_v[0], b, a)
            extra = {"recovery_classes": (decoder.linear_q_out(a) - descriptor.detach()).abs().mean(),
                     "recovery_patches": (decoder.linear_k_out(b) - patches.detach()).abs().mean()}  # fmt: skip
        return SimpleNamespace(logits=logits.unflatten(2, grid), extra=extra)

    def tower(self, trunk: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Class token B D, patches B N D, regions B R D, grid."""
        visual, prompts = trunk.visual, self.prompts
        region = visual.class_embedding + visual.positional_embedding[0]
        tokens, grid = trunk.embed(images, class_twice=True, extra=region.expand(REGIONS**2, -1))
        sets = torch.cat([prompts.prompt_embeddings, prompts.deep_prompt_embeddings])
        K = sets.shape[1]
        allowed = reading_mask(grid, K, REGIONS, images.device)
        mask = torch.zeros(allowed.shape, device=images.device).masked_fill(~allowed, float("-inf"))
        rest = tokens[:, 1:]
        for i, block in enumerate(trunk.blocks):
            own = prompts.prompt_proj(sets[i].expand(len(images), -1, -1))
            tokens = torch.cat([tokens[:, :1], own, rest], 1)
            part = block.attn
            qkv = F.linear(block.ln_1(tokens), part.in_proj_weight, part.in_proj_bias).chunk(3, 2)
            tokens = tokens + part.out_proj(attention(*qkv, part.num_heads, mask))
            tokens = tokens + block.mlp(block.ln_2(tokens))
            rest = tokens[:, 1 + K :]
        out = torch.cat([prompts.prompt_norm(tokens[:, : -(REGIONS**2)]), tokens[:, -(REGIONS**2) :]], 1)
        out = F.normalize(trunk.post_norm(out) @ visual.proj, dim=-1)
        return out[:, 0], out[:, 1 + K : -(REGIONS**2)], out[:, -(REGIONS**2) :], grid


def plain_losses(system: CLIP_RC, batch: SimpleNamespace) -> dict[str, Tensor]:
    """The losses of the inductive setting."""
    texts = system.texts[system.seen]
    scored = system.trained(system.trunk, system.pixels(batch.image, batch.valid), texts)
    logits = system.upsample(scored.logits, batch.label.shape[1:])
    target = system.targets(logits, batch)
    onehot = torch.stack([target == c for c in range(len(texts))], 1).float()
    p, present = logits.sigmoid(), onehot.sum((2, 3)) > 0
    right, alpha = p * onehot + (1 - p) * (1 - onehot), ALPHA * onehot + (1 - ALPHA) * (1 - onehot)
    focal = alpha * (1 - right) ** GAMMA * F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    dice = 1 - (2 * (p * onehot).sum((2, 3)) + 1) / (p.sum((2, 3)) + onehot.sum((2, 3)) + 1)
    pairs, options = present.sum().clamp(min=1), system.options
    losses = {"focal": options.focal * focal.mean((2, 3)).sum() / pairs, "dice": options.dice * (dice * present).sum() / pairs}
    return losses | system.weigh(scored.extra)


if __name__ == "__main__":
    main()
