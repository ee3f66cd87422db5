"""IMR-HSNet (IJCAI 2022): HSNet with CLIP's class activation maps instead of support masks. A recurrent cell refines the masks of
query and support together, stage by stage.

Shapes as in hsnet.py. Query and support go through the network as one batch of 2N, the queries first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.few_shot import hsnet
from model.few_shot.cam_prior import CamPrior
from model.few_shot.conv4d import Pair, Products, keep, shrink, unit
from model.few_shot.hsnet import WIDTHS, Decoder, Encoder4d, HSNet, vote_scores
from model.few_shot.parts import binary_mask
from model.few_shot.prior import Features
from model.few_shot.system import IDENTITY, Decoded
from model.losses import segmentation_loss
from model.ops import full, resize
from util.data.episodes import Episode
from util.errors import UserError
from util.run.identity import Facts

WIDTH, MIDDLE, SIDE = WIDTHS[-1], 512, 50  # channels of state and of the mid feature; grid of the learned first state
Levels = Sequence[Tensor]


class Gate(nn.Module):
    """1x1 to 512 channels, then a grouped 3x3 over each half of them.

    The mid feature, most of what the 1x1 reads, stays the same over the stages: its share is computed once (`share`).

    Args:
        inputs: channels of map, encoded correlation, mid feature and state, in this order.
    """

    def __init__(self, inputs: Sequence[int]):
        super().__init__()
        self.inputs = tuple(inputs)
        self.mix = nn.Conv2d(sum(inputs), 512, 1)
        self.first, self.second = (nn.Conv2d(256, WIDTH // 2, 3, padding=1, groups=8) for _ in range(2))

    def share(self, middle: Tensor) -> Tensor:
        return F.conv2d(middle, self.mix.weight.split(self.inputs, 1)[2], self.mix.bias)

    def forward(self, shown: Tensor, encoded: Tensor, share: Tensor, state: Tensor) -> Tensor:
        of_map, of_encoded, _, of_state = self.mix.weight.split(self.inputs, 1)
        changing = torch.cat([shown, encoded, state], 1)
        first, second = (share + F.conv2d(changing, torch.cat([of_map, of_encoded, of_state], 1))).chunk(2, 1)
        return torch.cat([self.first(first), self.second(second)], 1)


class Head(nn.Module):
    """Everything that IMR-HSNet trains.

    Args:
        blocks: of the backbone's levels.
        channels: of its stage 3.
        stages: how often the masks are refined.
        mask_mode: "official" or "paper", see `masks`.
    """

    def __init__(self, blocks: Sequence[int], channels: int, stages: int, mask_mode: str):
        super().__init__()
        self.stages, self.mask_mode = stages, mask_mode
        self.encoder, self.decoder = Encoder4d(blocks), Decoder()
        self.adapter = nn.Conv2d(channels, MIDDLE, 1) if channels != MIDDLE else nn.Identity()
        self.state = nn.Parameter(torch.zeros(1, WIDTH, SIDE, SIDE))
        self.z, self.r, self.h = (Gate((1, WIDTH, MIDDLE, WIDTH)) for _ in range(3))
        self.residual = nn.Sequential(nn.Conv2d(3, 10, 1), nn.GELU(), nn.Conv2d(10, 2, 1))

    def forward(self, query: Levels, support: Levels, query_cam: Tensor, support_cam: Tensor) -> list[Tensor]:
        """
        Args:
            query, support: levels 2, 3, 4, each N n C h w; cams: N 1 h w in 0..1.
        Returns:
            logits of each stage, 2N 2 h w at twice level 2: queries, then supports.
        """
        size = query[0].shape[3:]
        middle = self.adapter(torch.cat([query[1].sum(1), support[1].sum(1)]))
        shares = [resize(gate.share(middle), size) for gate in (self.z, self.r, self.h)]  # 1x1 and resizing change places
        state = resize(self.state, size).expand(len(middle), -1, -1, -1)
        kept = [[keep(unit(q), unit(s)) for q, s in zip(*levels, strict=True)] for levels in zip(query, support, strict=True)]
        norms = [torch.cat([full(x).norm(dim=2) for x in levels]) for levels in zip(query, support, strict=True)]
        maps, masks, logits = torch.cat([query_cam, support_cam]), [], []
        for _ in range(self.stages):
            masks = self.masks(masks, maps, [norm.shape[2:] for norm in norms])
            encoded = self.encoder(self.pairs(kept, norms, masks))
            shown = resize(maps, size)
            state = self.update(state, shown, encoded, shares)
            decoded = self.decoder(state + encoded)
            logits.append(self.residual(torch.cat([decoded, resize(shown, decoded.shape[2:])], 1)))
            maps = logits[-1].softmax(1)[:, 1:]
        return logits

    def masks(self, before: Sequence[Tensor], maps: Tensor, sizes: Sequence[torch.Size]) -> list[Tensor]:
        """Return the factors of the features in this stage, 2N 1 h w of each level.

        official: maps stay multiplied in later stages, and the first time each goes to the other image. They multiply both
            sides of a correlation. This is what the published weights were trained with.
        paper: maps of this stage alone; only the other image of a comparison is masked (`pairs`).

        Args:
            before: of the stage before; empty in the first.
        """
        if self.mask_mode == "official" and not before:
            maps = maps.roll(len(maps) // 2, 0)
        found = [resize(maps, size) for size in sizes]
        return [a * b for a, b in zip(before, found, strict=True)] if self.mask_mode == "official" and before else found

    def pairs(self, kept: Sequence[Sequence[Levels]], norms: Sequence[Tensor], masks: Sequence[Tensor]) -> Iterator[list[Pair]]:
        """Levels of each query with its support, then of each support with its query.

        Args:
            kept: by level and pair, see `keep`; norms: 2N n h w of the features of each level.
        """
        factors = [shrink(norm, mask) for norm, mask in zip(norms, masks, strict=True)]
        n = len(kept[0])
        for i in range(2 * n):
            other, levels = (i + n) % (2 * n), []
            for dots, factor in zip(kept, factors, strict=True):
                own = factor[i] if self.mask_mode == "official" else torch.ones_like(factor[i])
                levels.append(Products(dots[i % n][i // n], own, factor[other]))
            yield levels

    def update(self, state: Tensor, shown: Tensor, encoded: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """A convolutional GRU's next state; shares: of the mid feature in z, r and h."""
        z, r = (gate(shown, encoded, share, state).sigmoid() for gate, share in zip((self.z, self.r), shares, strict=False))
        return (1 - z) * state + z * self.h(shown, encoded, shares[2], r * state).tanh()


@dataclass
class Options(hsnet.Options):
    """IMR-HSNet's own options."""

    stages: int = 2  # how often the masks are refined; 3 on COCO
    mask_mode: Literal["official", "paper"] = "official"  # which side of a correlation is masked, see docs/systems/imr-hsnet.md
    cams: list[str] = field(default_factory=list)  # folders of maps that the published scripts stored, read and not computed

    def check(self) -> None:
        super().check()
        if self.stages < 1:
            raise UserError(f"Method.stages = {self.stages}: must be at least 1")


class IMRHSNet(HSNet):
    """IMR-HSNet. It reads the supports' class, and their masks only as targets of training. CLIP gives the activation maps."""

    facts = Facts(identity=(*IDENTITY, "Method.stages", "Method.mask_mode", "CLIP.clip_size"), priors=("cam",))
    Options = Options
    official = (
        ("head.encoder.", "hpn_learner."), ("head.decoder.", ""), ("head.state", "state"), ("head.adapter.", "conv1024_512."),
        ("head.residual.", "res."),
        *((f"head.{gate}.{part}.", f"conv{gate}{i}.") for gate in "zrh" for i, part in enumerate(("mix", "first", "second"))),
    )  # fmt: skip
    unused = (*HSNet.unused, "hpn_learner.decoder")

    def build_head(self, channels: int, priors: int) -> Head:
        if self.prior_names != ["cam"]:
            raise UserError(f"Method.priors = {self.prior_names}: IMR-HSNet reads its CAM and no other prior, leave it out")
        self.check_backbone()
        return Head(self.encoder.blocks, self.encoder.channels[3], self.options.stages, self.options.mask_mode)

    def prior_maps(self, episode: Episode, features: Features) -> dict[str, Tensor]:
        cam: CamPrior = self.priors[0]
        return {"cam": cam(episode, features), "support cam": cam.of_supports(episode, features)}

    def decode(self, head: nn.Module, features: Features, maps: Sequence[Tensor], own: Tensor) -> Decoded:
        query_cam, support_cam = maps
        shots = [level.unflatten(0, (-1, features.shot)) for level in features.support.levels]
        each = [head(features.query.levels, [level[:, k] for level in shots], query_cam, support_cam[:, k])
                for k in range(features.shot)]  # one by one, as each keeps its cosines  # fmt: skip
        stages = [torch.stack([x.unflatten(0, (2, -1)) for x in stage], 2).flatten(0, 2) for stage in zip(*each, strict=True)]
        votes = stages[-1].chunk(2)[0].unflatten(0, (-1, features.shot))
        return Decoded(vote_scores(votes), votes=votes, inner=stages)

    def pictures(self, decoded: Decoded) -> dict[str, Tensor]:
        """Return what each stage finds in the query, mean over the shots."""
        shot = decoded.votes.shape[1]
        found = [logits.chunk(2)[0].float().softmax(1)[:, 1].unflatten(0, (-1, shot)).mean(1) for logits in decoded.inner]
        return {f"stage {i}": foreground for i, foreground in enumerate(found, start=1)}

    def terms(self, decoded: Decoded, features: Features, episode: Episode) -> dict[str, Tensor]:
        """Both masks at every stage; unlabelled pixels are background, as published."""
        query = (episode.query_mask == 1).long().repeat_interleave(features.shot, 0)
        targets = {"query": query, "support": binary_mask(episode.support_mask.flatten(0, 1))[:, 0].long()}
        pairs = [dict(zip(targets, logits.chunk(2), strict=True)) for logits in decoded.inner]
        loss = partial(segmentation_loss, foreground=self.options.foreground_weight)
        return {name: sum(loss(pair[name], target) for pair in pairs) for name, target in targets.items()}

    def baselines(self, batch: Episode, features: Features, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        side = batch.query_mask.shape[1:]
        return super().baselines(batch, features, maps) | {"CAM > 0.5": resize(maps["cam"][:, None], side)[:, 0] > 0.5}
