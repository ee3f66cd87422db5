"""HDMNet, PI-CLIP, HSNet and IMR-HSNet, plainly: everything computed, no identity, no cache.

Written from the published description, as slow as that reads. It takes convolutions, norms and linear layers from a system,
for their weights, and says in plain form what model/ computes in a cheaper one. `tests/test_oracle.py` compares the two,
`python -m bench` and `python -m bench.hsnet` their time.
"""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.few_shot import hsnet, imr_hsnet
from model.few_shot.conv4d import CenterPivotConv4d, Pair
from model.few_shot.hdmnet import PRIOR_SCALE, HDMNet
from model.few_shot.matcher import Level
from util.data.episodes import Episode


def plain_scores(system: HDMNet, episode: Episode, i: int) -> tuple[Tensor, Tensor]:
    """Ensemble scores and meta logits of episode i of a batch, each 2 S S."""
    query, side = episode.query[i : i + 1], episode.query.shape[2:]
    supports = [image[None] for image in episode.support[i]]
    masks = [(mask == 1).float()[None, None] for mask in episode.support_mask[i]]
    q, s = backbone(system, query), [backbone(system, x, m) for x, m in zip(supports, masks, strict=True)]
    size = q["middle"].shape[2:]
    makers = {
        "vtp": lambda: text_prior(system, episode, i).repeat(1, 2, 1, 1),
        "vvp": lambda: visual_prior(system, query, supports, masks),
        "similarity": lambda: similarity_prior(q, s, masks),
    }
    priors = torch.cat([corners(makers[name](), size) for name in system.prior_names], 1)

    head = system.head
    query_feature = head.down_query(q["middle"])
    support_features = [head.down_supp(x["middle"]) for x in s]
    prototypes = []
    for feature, mask in zip(support_features, masks, strict=True):
        weight = corners(mask, size)
        prototypes.append((feature * weight).sum((2, 3), keepdim=True) / (weight.sum() + 5e-4))
    prototype = sum(prototypes) / len(prototypes)
    query_feature = head.query_merge(torch.cat([query_feature, prototype.expand_as(query_feature), PRIOR_SCALE * priors], 1))
    support_features = [head.supp_merge(torch.cat([x, p.expand_as(x)], 1))
                        for x, p in zip(support_features, prototypes, strict=True)]  # fmt: skip
    meta = matcher(head.matcher, query_feature, support_features, masks, priors)

    difference = torch.stack([((q["gram"] - x["gram"]) ** 2).sum().sqrt() / q["gram"].shape[-1] for x in s])[None]
    psi = (head.ensemble.shot_weights(difference) * difference).sum(1)
    final = head.ensemble(meta, q["base"], psi, episode.base_rank[i : i + 1])
    return corners(final, side)[0], corners(meta, side)[0]


def corners(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def backbone(system: HDMNet, image: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Every stage, the pyramid pooling and the classifier, for supports too."""
    learner = system.base_learner.module
    stages = learner.encoder(image, mask if system.masks_support else None, last=4)
    low = stages[system.low_stage].flatten(2)[0]
    unit = low / low.norm(dim=1, keepdim=True).clamp(min=1e-12)
    hidden = learner.hidden(stages[4])
    middle = torch.cat([stages[3], corners(stages[2], stages[3].shape[2:])], 1)
    return {"middle": middle, "stage4": stages[4], "hidden": hidden, "base": learner.classify(hidden), "gram": unit @ unit.T}


def best_cosine(query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
    """1 1 h w: of every query position the best cosine with the support, whose outside is zero."""
    support = support * F.interpolate(mask, support.shape[2:], mode="nearest")
    q, s = query.flatten(2)[0], support.flatten(2)[0]
    cosine = (q.T @ s) / (q.norm(dim=0)[:, None] * s.norm(dim=0)[None] + 1e-7)
    return cosine.max(1).values.view(1, 1, *query.shape[2:])


def similarity_prior(q: dict[str, Tensor], s: list[dict[str, Tensor]], masks: list[Tensor]) -> Tensor:
    shots = list(zip(s, masks, strict=True))
    return torch.cat([sum(best_cosine(q[part], x[part], m) for x, m in shots) / len(s) for part in ("hidden", "stage4")], 1)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """N C each -> N C, and the attention H N N."""
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1), weights


def block(layer: nn.Module, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """One block of CLIP on tokens N C, a = ln_1(x): output, and the attention averaged over heads."""
    q, k, v = F.linear(a, layer.attn.in_proj_weight, layer.attn.in_proj_bias).chunk(3, 1)
    out, weights = attention(q, k, v, layer.attn.num_heads)
    x = x + layer.attn.out_proj(out)
    return x + layer.mlp(layer.ln_2(x)), weights.mean(0)


def clip_blocks(trunk: nn.Module, image: Tensor, last: bool) -> tuple[list[Tensor], list[Tensor], tuple[int, int]]:
    """Outputs and attentions of all blocks (without the last one if not asked for) of one normalised image, the patch grid."""
    tokens, grid = trunk.embed(image)
    x, outputs, maps = tokens[0], [], []
    for layer in trunk.blocks if last else trunk.blocks[:-1]:
        x, weights = block(layer, x, layer.ln_1(x))
        outputs.append(x)
        maps.append(weights)
    return outputs, maps, grid


def visual_prior(system: HDMNet, query: Tensor, supports: list[Tensor], masks: list[Tensor]) -> Tensor:
    trunk = system.clip.module.visual

    def tokens(image: Tensor) -> list[Tensor]:
        outputs, _, grid = clip_blocks(trunk, image, last=True)
        return [x[1:].T.view(1, -1, *grid) for x in (outputs[-1], outputs[-2])]

    q = tokens(trunk.normalise(query, "imagenet"))
    s = [tokens(trunk.normalise(x, "imagenet") * m) for x, m in zip(supports, masks, strict=True)]
    return torch.cat([best_cosine(q[level], x[level], m) for level in (0, 1) for x, m in zip(s, masks, strict=True)], 1)


def unit_range(x: Tensor) -> Tensor:
    x = x - x.min()
    return x / (x.max() + 1e-7)


def text_prior(system: HDMNet, episode: Episode, i: int) -> Tensor:
    """Grad-CAM of the class text, spread by the squared affinity inside its boxes; 1 1 H0 W0."""
    prior = system.priors[system.prior_names.index("vtp")]
    trunk, target = system.clip.module.visual, int(episode.cls[i]) - 1
    outputs, maps, grid = clip_blocks(trunk, trunk.normalise(episode.clip_query[i][None]), last=False)
    columns = prior.candidates(episode)[i].nonzero()[:, 0].tolist()
    texts, final = prior.bank[columns], trunk.blocks[-1]
    with torch.enable_grad():
        a = final.ln_1(outputs[-1]).detach().requires_grad_()
        z, last_map = block(final, outputs[-1], a)
        image = trunk.post_norm(z[None])[0, 1:].mean(0) @ trunk.visual.proj
        probability = (system.clip.module.logit_scale.exp() * texts @ (image / image.norm())).softmax(0)
        (gradient,) = torch.autograd.grad(probability[columns.index(target)], a)
    alpha = gradient[1:].mean(0)
    cam = unit_range(unit_range((a.detach()[1:] * alpha).sum(1).relu())).view(grid)

    affinity = (sum(maps[-7:]) + last_map.detach())[1:, 1:] / 8
    affinity = affinity / affinity.sum(0, keepdim=True)
    affinity = affinity / affinity.sum(1, keepdim=True)
    affinity = torch.maximum(affinity, affinity @ affinity.T)
    squared = (affinity @ affinity) * boxes(cam).flatten()
    refined = unit_range(squared @ cam.flatten()).view(1, 1, *grid)
    return F.interpolate(refined, tuple(episode.annotation_hw[i].tolist()), mode="bilinear", align_corners=False)


def boxes(cam: Tensor) -> Tensor:
    """h w in {0, 1}: the boxes of the connected components above 0.4 of the maximum; the last row and column never belong."""
    level = np.trunc(255 * cam.double().numpy())
    _, _, found, _ = cv2.connectedComponentsWithStats((level > int(0.4 * level.max())).astype(np.uint8), connectivity=8)
    mask = torch.zeros_like(cam)
    height, width = cam.shape
    for left, top, w, h, _ in found[1:]:
        mask[top : min(top + h, height - 1), left : min(left + w, width - 1)] = 1
    return mask


def matcher(net: nn.Module, query: Tensor, supports: list[Tensor], masks: list[Tensor], priors: Tensor) -> Tensor:
    """1 2 h w logits; every image through every level alone, every query token against every support token."""
    matched = []
    for level in net.levels:
        (q, size), encoded = encode(level, query), [encode(level, x)[0] for x in supports]
        inside = torch.cat([F.interpolate(m, size, mode="nearest").flatten() for m in masks])
        merged = torch.cat([match(level.match, q, torch.cat(encoded), inside, size), corners(priors, size)], 1)
        matched.append(level.merge["bn"](level.merge["conv"](merged)).relu())
        query, supports = as_map(q, size), [as_map(x, size) for x in encoded]
    out = one_by_one(net.levels[2].parse, matched[2])
    for i in (1, 0):
        out = F.interpolate(out, matched[i].shape[2:], mode="bilinear", align_corners=False)
        out = out + one_by_one(net.levels[i].parse, matched[i] + out)
    return one_by_one(net.head, out)


def one_by_one(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return tokens.T.reshape(1, -1, *size)


def encode(level: Level, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    tokens, size = level.embed(x)
    x = tokens[0]
    for layer in level.blocks:
        a = layer.norm1(x)
        source = a
        if layer.attn.reduction > 1 and min(size) >= layer.attn.reduction:
            source = layer.attn.norm(layer.attn.sr(as_map(a, size)).flatten(2)[0].T)
        out, _ = attention(layer.attn.q(a), layer.attn.k(source), layer.attn.v(source), layer.attn.heads)
        x = x + layer.attn.o(out)
        x = x + layer.ffn(layer.norm2(x)[None], size)[0]
    return level.norm(x), size


def match(layer: nn.Module, query: Tensor, support: Tensor, inside: Tensor, size: tuple[int, int]) -> Tensor:
    """1 C h w. query: N C; support: M C; inside: M in {0, 1}."""
    a, source = layer.norm1(query), layer.norm1(support)
    split = lambda x: x.unflatten(1, (layer.heads, -1)).transpose(0, 1)  # noqa: E731
    q, k, v = split(layer.q(a)), split(layer.k(source)), split(layer.v(source))
    q, k = q / q.norm(dim=2, keepdim=True), k / k.norm(dim=2, keepdim=True)
    weights = (q @ k.transpose(1, 2) / 0.1).softmax(1) * inside  # over the query's positions
    out = query + layer.o((weights @ v).transpose(0, 1).flatten(1))
    return as_map(out + layer.ffn(layer.norm2(out)[None], size)[0], size)


def correlation(query: Tensor, support: Tensor) -> Tensor:
    """N n C h w and N n C k l -> N n h w k l."""
    q, s = (x.flatten(3) / (x.flatten(3).norm(dim=2, keepdim=True) + 1e-5) for x in (query, support))
    return (q.transpose(2, 3) @ s).clamp(min=0).unflatten(3, support.shape[3:]).unflatten(2, query.shape[3:])


def masked(level: Tensor, mask: Tensor) -> Tensor:
    """N n C h w times a mask N 1 S S."""
    return level * corners(mask, level.shape[3:])[:, None]


def whole(pair: Pair) -> Tensor:
    """n h w k l: what the model computes piece by piece."""
    everywhere = slice(None)
    return pair.within(everywhere, everywhere)(everywhere).unflatten(0, pair.grid[:2]).permute(4, 0, 1, 2, 3)


def conv4d(layer: CenterPivotConv4d, x: Tensor) -> Tensor:
    """N c h w k l -> N c' h w k' l'."""
    y = layer.conv2(x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)).unflatten(0, (len(x), *x.shape[2:4])).permute(0, 3, 1, 2, 4, 5)
    return over_query(layer.conv1, x[..., :: layer.stride, :: layer.stride]) + y


def over_query(layer, x: Tensor) -> Tensor:
    y = layer(x.permute(0, 4, 5, 1, 2, 3).flatten(0, 2))
    return y.unflatten(0, (len(x), *x.shape[4:])).permute(0, 3, 4, 5, 1, 2)


def squeeze(layers: nn.Sequential, x: Tensor) -> Tensor:
    for conv, norm in zip(layers[::3], layers[1::3], strict=True):
        x = F.group_norm(conv4d(conv, x), norm.num_groups, norm.weight, norm.bias, norm.eps).relu()
    return x


def encoder4d(net: hsnet.Encoder4d, correlations: list[Tensor]) -> Tensor:
    """N n h w k l of levels 2, 3, 4 -> N 128 h w."""
    parts = net.encoder_layer2, net.encoder_layer3, net.encoder_layer4
    s2, s3, s4 = (squeeze(part, x) for part, x in zip(parts, correlations, strict=True))
    mixed = squeeze(net.encoder_layer4to3, over_query(lambda x: corners(x, s3.shape[2:4]), s4) + s3)
    mixed = squeeze(net.encoder_layer3to2, over_query(lambda x: corners(x, s2.shape[2:4]), mixed) + s2)
    return mixed.mean((4, 5))


def plain_hsnet(head: hsnet.Head, query: list[Tensor], support: list[Tensor], mask: Tensor) -> Tensor:
    """All pairs together. Levels B n C h w and B*K n C h w, mask B*K 1 S S -> logits B*K 2 h w."""
    query = [level.repeat_interleave(len(mask) // len(level), 0) for level in query]
    found = [correlation(q, masked(s, mask)) for q, s in zip(query, support, strict=True)]
    return head.decoder(encoder4d(head.encoder, found))


def gate(net: imr_hsnet.Gate, *parts: Tensor) -> Tensor:
    first, second = net.mix(torch.cat(parts, 1)).chunk(2, 1)
    return torch.cat([net.first(first), net.second(second)], 1)


def plain_imr_hsnet(head: imr_hsnet.Head, query: list[Tensor], support: list[Tensor], query_cam: Tensor, support_cam: Tensor
                    ) -> list[Tensor]:  # fmt: skip
    """Logits 2N 2 h w of each stage, from the published masking as it reads: features are masked anew, again and again."""
    size, official = query[0].shape[3:], head.mask_mode == "official"
    middle = head.adapter(corners(torch.cat([query[1].sum(1), support[1].sum(1)]), size))
    state = corners(head.state, size).expand(len(middle), -1, -1, -1)
    q_map, s_map, logits = query_cam, support_cam, []
    for stage in range(head.stages):
        if official:
            first, second = (s_map, q_map) if stage == 0 else (q_map, s_map)
            query, support = [masked(x, first) for x in query], [masked(x, second) for x in support]
            forth = [correlation(q, s) for q, s in zip(query, support, strict=True)]
            back = [x.permute(0, 1, 4, 5, 2, 3) for x in forth]
        else:
            forth = [correlation(q, masked(s, s_map)) for q, s in zip(query, support, strict=True)]
            back = [correlation(s, masked(q, q_map)) for q, s in zip(query, support, strict=True)]
        encoded = encoder4d(head.encoder, [torch.cat(pair) for pair in zip(forth, back, strict=True)])
        shown = corners(torch.cat([q_map, s_map]), size)
        z, r = (gate(net, shown, encoded, middle, state).sigmoid() for net in (head.z, head.r))
        state = (1 - z) * state + z * gate(head.h, shown, encoded, middle, r * state).tanh()
        decoded = head.decoder(state + encoded)
        logits.append(head.residual(torch.cat([decoded, corners(shown, decoded.shape[2:])], 1)))
        q_map, s_map = logits[-1].softmax(1)[:, 1:].chunk(2)
    return logits
