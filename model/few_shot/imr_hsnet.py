"""IMR-HSNet (IJCAI 2022): HSNet with CLIP's class activation maps instead of support masks. A recurrent cell refines the masks of
query and support together, stage by stage.

Shapes as in hsnet.py. Query and support go through the network as one batch of 2N, the queries first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from model.few_shot.cam import CamPrior
from model.few_shot.hsnet import WIDTHS, Decoder, Encoder4d, HSNet, correlation, masked, vote_scores
from model.few_shot.parts import binary_mask
from model.few_shot.prior import Features
from model.few_shot.system import IDENTITY, Decoded
from model.losses import segmentation_loss
from model.ops import resize
from util.data.episodes import Episode
from util.errors import UserError
from util.run.identity import Facts

WIDTH, MIDDLE, SIDE = WIDTHS[-1], 512, 50  # channels of state and of the mid feature; grid of the learned first state
Levels = Sequence[Tensor]


class Gate(nn.Module):
    """1x1 to 512 channels, then a grouped 3x3 over each half of them."""

    def __init__(self, inputs: int):
        super().__init__()
        self.mix = nn.Conv2d(inputs, 512, 1)
        self.first, self.second = (nn.Conv2d(256, WIDTH // 2, 3, padding=1, groups=8) for _ in range(2))

    def forward(self, *parts: Tensor) -> Tensor:
        first, second = self.mix(torch.cat(parts, 1)).chunk(2, 1)
        return torch.cat([self.first(first), self.second(second)], 1)


class Head(nn.Module):
    """Everything that IMR-HSNet trains.

    Args:
        blocks: of the backbone's levels.
        channels: of its stage 3.
        stages: how often the masks are refined.
        mask_mode: "official" or "paper", see `correlations`.
    """

    def __init__(self, blocks: Sequence[int], channels: int, stages: int, mask_mode: str):
        super().__init__()
        self.stages, self.mask_mode = stages, mask_mode
        self.encoder, self.decoder = Encoder4d(blocks), Decoder()
        self.adapter = nn.Conv2d(channels, MIDDLE, 1) if channels != MIDDLE else nn.Identity()
        self.state = nn.Parameter(torch.zeros(1, WIDTH, SIDE, SIDE))
        self.z, self.r, self.h = (Gate(1 + WIDTH + MIDDLE + WIDTH) for _ in range(3))
        self.residual = nn.Sequential(nn.Conv2d(3, 10, 1), nn.GELU(), nn.Conv2d(10, 2, 1))

    def forward(self, query: Levels, support: Levels, query_cam: Tensor, support_cam: Tensor) -> list[Tensor]:
        """
        Args:
            query, support: levels 2, 3, 4, each N n C h w; cams: N 1 h w in 0..1.
        Returns:
            logits of each stage, 2N 2 h w at twice level 2: queries, then supports.
        """
        size = query[0].shape[3:]
        middle = self.adapter(resize(torch.cat([query[1].sum(1), support[1].sum(1)]), size))
        state = resize(self.state, size).expand(len(middle), -1, -1, -1)
        maps, swapped, logits = torch.cat([query_cam, support_cam]), self.mask_mode == "official", []
        for _ in range(self.stages):
            query, support, pairs = self.correlations(query, support, maps, swapped)
            encoded = self.encoder(pairs)
            shown = resize(maps, size)
            state = self.update(state, shown, encoded, middle)
            decoded = self.decoder(state + encoded)
            logits.append(self.residual(torch.cat([decoded, resize(shown, decoded.shape[2:])], 1)))
            maps, swapped = logits[-1].softmax(1)[:, 1:], False
        return logits

    def correlations(self, query: Levels, support: Levels, maps: Tensor, swapped: bool) -> tuple[Levels, Levels, Levels]:
        """Return the levels for the next stage, and correlations of both directions.

        official: maps multiply both sides, stay multiplied in later stages, and the first time each goes to the other image
            (swapped). This is what the published weights were trained with. One direction is the transposed other.
        paper: only the other image of a comparison is masked, by its own map, anew at each stage.
        """
        own, other = maps.chunk(2)
        if self.mask_mode == "paper":
            forth = [correlation(q, masked(s, other)) for q, s in zip(query, support, strict=True)]
            back = [correlation(s, masked(q, own)) for q, s in zip(query, support, strict=True)]
            return query, support, [torch.cat(pair) for pair in zip(forth, back, strict=True)]
        own, other = (other, own) if swapped else (own, other)
        query, support = [masked(q, own) for q in query], [masked(s, other) for s in support]
        forth = [correlation(q, s) for q, s in zip(query, support, strict=True)]
        return query, support, [torch.cat([x, x.permute(0, 1, 4, 5, 2, 3)]) for x in forth]

    def update(self, state: Tensor, shown: Tensor, encoded: Tensor, middle: Tensor) -> Tensor:
        """A convolutional GRU's next state."""
        seen = shown, encoded, middle
        z, r = self.z(*seen, state).sigmoid(), self.r(*seen, state).sigmoid()
        return (1 - z) * state + z * self.h(*seen, r * state).tanh()


@dataclass
class Options:
    """IMR-HSNet's own options."""

    stages: int = 2  # how often the masks are refined; 3 on COCO
    mask_mode: Literal["official", "paper"] = "official"  # which side of a correlation is masked, see docs/systems/imr-hsnet.md

    def check(self) -> None:
        if self.stages < 1:
            raise UserError(f"System.stages = {self.stages}: must be at least 1")


class IMRHSNet(HSNet):
    """IMR-HSNet. It reads the supports' class, and their masks only as targets of training. CLIP gives the activation maps."""

    facts = Facts(identity=(*IDENTITY, "System.stages", "System.mask_mode", "CLIP.clip_size"), priors=("cam",))
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
        query, cams = ([x.repeat_interleave(features.shot, 0) for x in xs] for xs in (features.query.levels, [query_cam]))
        stages = head(query, features.support.levels, cams[0], support_cam.flatten(0, 1))
        votes = stages[-1].chunk(2)[0].unflatten(0, (-1, features.shot))
        return Decoded(vote_scores(votes), votes=votes, inner=stages)

    def terms(self, decoded: Decoded, features: Features, episode: Episode) -> dict[str, Tensor]:
        """Both masks at every stage; unlabelled pixels are background, as published."""
        query = (episode.query_mask == 1).long().repeat_interleave(features.shot, 0)
        targets = {"query": query, "support": binary_mask(episode.support_mask.flatten(0, 1))[:, 0].long()}
        pairs = [dict(zip(targets, logits.chunk(2), strict=True)) for logits in decoded.inner]
        return {name: sum(segmentation_loss(pair[name], target) for pair in pairs) for name, target in targets.items()}

    def baselines(self, batch: Episode, features: Features, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        side = batch.query_mask.shape[1:]
        return super().baselines(batch, features, maps) | {"CAM > 0.5": resize(maps["cam"][:, None], side)[:, 0] > 0.5}
