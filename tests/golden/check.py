"""Builds a system on deterministic weights, runs a golden file's inputs through it and measures every array."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor

from model.backbone import BaseLearner, build_encoder
from model.clip import Clip, refine
from model.clip.load import clip_from_state
from model.clip.text import BACKGROUND, FOREGROUND
from model.few_shot.bam import BAM
from model.few_shot.hdmnet import PICLIP, HDMNet
from model.few_shot.parts import binary_mask
from model.few_shot.pfenet import PFENet
from model.few_shot.prior import CosinePrior, SimilarityPrior, TextPrior, VisualPrior, join
from model.few_shot.system import FewShot
from model.ops import resize
from model.system import Frozen
from tests.golden.check_clip_rc import check_clip_rc
from tests.golden.check_hsnet import check_hsnet
from tests.golden.check_imr_hsnet import check_clip, check_imr_hsnet
from tests.golden.check_insid3 import check_insid3
from tests.golden.check_ovs import check_ovs
from tests.golden.check_weclip import check_weclip
from tests.golden.fill import tensor_for
from tests.golden.rows import Row, compare
from util.config import Train
from util.data.episodes import Episode
from util.data.folds import fold, read_class_names
from util.data.transforms import clip_input

LISTS = Path(__file__).parents[2] / "lists"


class Golden:
    """A loaded file. Files hold plain arrays; nothing is unpickled."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self.system = str(self["system"])
        self.data_set = str(self["data_set"])
        self.shot, self.salt = int(self["shot"]), int(self["salt"])

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def text(self, key: str, default: str) -> str:
        """What the file says of the system it is of, or what the public files mean."""
        return str(self[key]) if key in self else default

    def rows(self, prefix: str) -> list[np.ndarray]:
        return [self[f"{prefix}_{i}"] for i in range(len(self["query"])) if f"{prefix}_{i}" in self]

    def fill(self, name: str, shape: torch.Size) -> Tensor:
        tensor = tensor_for(name, shape, self.salt)
        if name in ("gram_merge.weight", "cls_merge.weight"):
            tensor = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1) + 0.1 * tensor
        return tensor


def system_of(path: Path) -> str:
    """The system whose arrays a file holds; where the file does not say it, the start of its name does."""
    with np.load(path, allow_pickle=False) as archive:
        name = str(archive["system"]) if "system" in archive else path.stem
    return next((system for system in CHECKS if name.replace("cliprc", "clip_rc").startswith(system)), name)


def filled_clip(golden: Golden) -> Clip:
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in open_clip.model.CLIP(**open_clip_config()).state_dict().items() if k != "attn_mask"}
    return clip_from_state({name: golden.fill(name, shape) for name, shape in shapes.items()})


def open_clip_config() -> dict:
    return open_clip.get_model_config("ViT-B-16-quickgelu")


def build(golden: Golden) -> FewShot:
    """The system of a file with every tensor filled under its official name, loaded by `import_official`."""
    data = fold(golden.data_set, 0)
    encoder = build_encoder(golden.text("backbone", "resnet50"))
    low = {"low_fea": golden.text("low_fea", "layer2")}
    base_learner = Frozen(BaseLearner(encoder, len(data.base) + 1))
    system: FewShot
    if golden.system == "pfenet":
        scales = golden["ppm_scales"].tolist() if "ppm_scales" in golden else [21, 10, 5, 2]  # of the public files
        system = PFENet(Frozen(encoder), [CosinePrior()], golden.shot, PFENet.Options(**low, ppm_scales=scales))
    elif golden.system == "bam":
        system = BAM(base_learner, [CosinePrior()], golden.shot, BAM.Options(**low))
    elif golden.system == "hdmnet":
        system = HDMNet(base_learner, [SimilarityPrior()], golden.shot, HDMNet.Options(**low))
    else:
        clip = Frozen(filled_clip(golden))
        names = read_class_names(LISTS / golden.data_set / "classes.txt").texts
        bank = clip.module.text.bank([template.format(name) for template in (FOREGROUND, BACKGROUND) for name in names])
        priors = [TextPrior(clip, bank, "present", data.base), VisualPrior(clip, golden.shot)]
        system = PICLIP(base_learner, priors, golden.shot, PICLIP.Options(**low), clip)
    own = {system.official_name(ours): value.shape for ours, value in system.state_dict().items()}
    own.pop(None, None)  # CLIP, filled above
    system.import_official({name: golden.fill(name, shape) for name, shape in own.items()})
    return system.eval()


def episode(golden: Golden) -> Episode:
    query, B = golden["query"], len(golden["query"])
    classes = 80 if golden.data_set == "coco" else 20
    present = torch.zeros(B, classes, dtype=torch.bool)
    sizes = np.full((B, 2), query.shape[1])
    if "label_ids" in golden:
        for row, ids in zip(present, golden["label_ids"], strict=True):
            row[ids[ids >= 0]] = True
    if golden.data_set == "pascal" and "sizes_wh" in golden:
        sizes = golden["sizes_wh"][:, ::-1]
    as_images = lambda x: torch.from_numpy(x).movedim(-1, -3).float()  # noqa: E731
    return Episode(
        query=as_images(query), query_mask=torch.from_numpy(golden["query_mask"]),
        support=as_images(golden["support"]), support_mask=torch.from_numpy(golden["support_mask"]),
        base_label=torch.from_numpy(golden["base_label"]),
        cls=torch.from_numpy(golden["target_class"]) + 1 if "target_class" in golden else torch.ones(B, dtype=torch.int64),
        base_rank=torch.full((B,), -1), present=present,  # evaluation leaves no base class out
        clip_query=[clip_input(image.astype(np.float32), tuple(hw)) for image, hw in zip(query, sizes, strict=True)],
        annotation_hw=torch.from_numpy(sizes.copy()), number=torch.arange(B), original_mask=[], original_base=[],
        query_name=["golden"] * B, support_names=[["golden"] * golden.shot] * B,
    )  # fmt: skip


def check_file(path: Path) -> Iterator[Row]:
    """Yields one row per array of the file (and per stage fed from the file)."""
    yield from CHECKS[system_of(path)](path)


def check_few_shot(path: Path) -> Iterator[Row]:
    golden = Golden(path)
    system, batch = build(golden), episode(golden)
    yield from {"bam": check_bam, "pfenet": check_pfenet}.get(golden.system, check_hdmnet)(golden, system, batch)


def check_hdmnet(golden: Golden, system: HDMNet, batch: Episode) -> Iterator[Row]:
    clip = golden.system == "pi_clip"
    close, loose = (1e-4, 1e-4) if clip else (5e-6, 2e-5)
    with torch.no_grad():
        features = system.features(batch)
        if clip:
            yield from check_text_prior(golden, system.priors[0], batch)
        maps = system.prior_maps(batch, features)
        for prior, array, tolerance in (("vtp", "vtp_map", 1e-4), ("vvp", "vvp_map", 5e-6), ("similarity", "similarity", 5e-6)):
            if prior in maps:
                yield compare(array, maps[prior], golden[array], tolerance)
        middle = features.query.middle, features.support.middle
        query, support = system.head.merge(*middle, features.mask, join(list(maps.values())))
        yield compare("matcher_query", query, golden["matcher_query"], close)
        yield compare("matcher_support", support, golden["matcher_support"], 5e-6)
        yield from check_matcher(golden, system)
        decoded = system.decode(system.head, features, list(maps.values()), batch.base_rank)
        yield compare("matcher_logits", decoded.meta, golden["matcher_logits"], loose)
        for i, correlation in enumerate(decoded.correlations):
            yield compare(f"matcher_weight_{i}", correlation, golden[f"matcher_weight_{i}"], close)
        prediction = system.predict(batch)
        yield compare("final", prediction.final, golden["final"], 1e-5 if clip else 5e-6)
        yield compare("meta", prediction.meta[..., ::4, ::4], golden["meta"], loose)
        yield check_base(golden, system, batch)
    yield from check_training(golden, system, batch, ("main", "distil", "base"))


def check_bam(golden: Golden, system: BAM, batch: Episode) -> Iterator[Row]:
    prediction = system.predict(batch)
    yield compare("final", prediction.final, golden["final"], 2e-6)
    yield compare("meta", prediction.meta[..., ::4, ::4], golden["meta"], 2e-6)
    yield check_base(golden, system, batch)
    yield from check_training(golden, system, batch, ("main", "meta", "base"))


def check_pfenet(golden: Golden, system: PFENet, batch: Episode) -> Iterator[Row]:
    yield compare("final", system.predict(batch).final, golden["final"], 2e-6)
    yield from check_training(golden, system, batch, ("main", "inner"))


def check_text_prior(golden: Golden, prior: TextPrior, batch: Episode) -> Iterator[Row]:
    classes = len(prior.bank) // 2
    yield compare("fg_text", prior.bank[:classes], golden["fg_text"], 1e-6)
    yield compare("bg_text", prior.bank[classes:], golden["bg_text"], 1e-6)
    candidates = prior.candidates(batch)
    for i, (raw, probability) in enumerate(zip(golden.rows("cam_raw"), golden.rows("cam_prob"), strict=True)):
        cam, attention = prior.cam(batch.clip_query[i][None], candidates[i : i + 1], batch.cls[i : i + 1] - 1)
        yield compare(f"cam_raw_{i}", cam.map[0], raw, 1e-4)
        ids = golden["label_ids"][i]
        ids = ids[ids >= 0]
        yield compare(f"cam_prob_{i}", cam.probability[0][np.concatenate([ids, ids + classes])], probability, 1e-5)
        if f"vtp_{i}" in golden:
            size = tuple(batch.annotation_hw[i].tolist())
            fed = refine(torch.from_numpy(raw)[None], attention)
            yield compare(f"vtp_{i} (cam_raw fed)", resize(fed[None], size, corners=False)[0, 0], golden[f"vtp_{i}"], 1e-4)
    for i, prior_map in enumerate(prior.at_annotation_size(batch, range(len(batch)))):
        if f"vtp_{i}" in golden:
            yield compare(f"vtp_{i}", prior_map, golden[f"vtp_{i}"], 1e-4)


@torch.no_grad()
def check_base(golden: Golden, system: FewShot, batch: Episode) -> Row:
    """The base learner in float64: fifty fp32 convolutions round up to 5.5e-6 away on a processor without AVX-512, and the row is
    about the formula. `final` and the losses see the fp32 ones."""
    base = copy.deepcopy(system.base_learner).double()(batch.query.double())
    return compare("base", resize(base, batch.query.shape[2:])[..., ::8, ::8], golden["base"], 5e-6)


def check_matcher(golden: Golden, system: HDMNet) -> Iterator[Row]:
    """The matcher alone, every input taken from the file; in float64, as `check_base`."""
    arrays = ("vtp_map", "vvp_map") if golden.system == "pi_clip" else ("similarity",)
    priors = torch.cat([torch.from_numpy(golden[a]) for a in arrays], 1).double()
    query, support = (torch.from_numpy(golden[f"matcher_{side}"]).double() for side in ("query", "support"))
    mask = binary_mask(torch.from_numpy(golden["support_mask"]).flatten(0, 1)).double()
    logits, correlations = copy.deepcopy(system.head.matcher).double()(query, support, mask, priors)
    yield compare("matcher_logits (fed)", logits, golden["matcher_logits"], 1e-5)
    for i, correlation in enumerate(correlations):
        yield compare(f"matcher_weight_{i} (fed)", correlation, golden[f"matcher_weight_{i}"], 5e-6)


def check_training(golden: Golden, system: FewShot, batch: Episode, terms: Sequence[str]) -> Iterator[Row]:
    """Losses, gradient norms and one optimizer step, with dropout off. PI-CLIP's priors are those of the file: what Grad-CAM
    rounds (rows vtp_*: up to 4e-5 on a processor without AVX-512) is 2.5e-4 in the gradients, in float64 as in fp32."""
    if "vtp" in system.prior_names:
        given = {name: torch.from_numpy(golden[f"{name}_map"]) for name in system.prior_names}
        system.prior_maps = lambda episode, features: given
    names = [str(name) for name in golden["grad_names"]]
    ours = {system.official_name(key): key for key in system.state_dict()}
    parameters = dict(system.named_parameters())
    tensors = [parameters[ours[name]] for name in names]
    for tensor in tensors:
        tensor.requires_grad_()  # the published base learner's last conv is not frozen in HDMNet
    losses = system.losses(replace(batch, base_rank=torch.from_numpy(golden["cat_idx"])))
    for i, term in enumerate(terms):
        if "losses" in golden:
            yield compare(f"losses[{i}] ({term})", losses[term], golden["losses"][i], 1e-5, relative=True)
        else:
            yield compare(f"loss_{term}", losses[term], golden[f"loss_{term}"], 1e-5, relative=True)
    gradients = torch.autograd.grad(sum(losses.values()), tensors, allow_unused=True)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = torch.zeros_like(tensor) if gradient is None else gradient
    norms, loose = torch.stack([t.grad.norm() for t in tensors]), np.array([n == "learner_base.1.0.weight" for n in names])
    yield compare("grad_norms", norms[~loose], golden["grad_norms"][~loose], 1e-4, relative=True)
    if loose.any():
        yield compare("grad_norms (learner_base.1.0)", norms[loose], golden["grad_norms"][loose], 2e-3, relative=True)
    if "param_norms_after_step" in golden:
        system.optimizer(Train()).step()
        norms = torch.stack([t.detach().norm() for t in tensors])
        small = np.array([t.numel() < 10_000 for t in tensors])
        reference = golden["param_norms_after_step"]
        yield compare("param_norms (small)", norms[small], reference[small], 1e-6, relative=True)
        yield compare("param_norms (large)", norms[~small], reference[~small], 1e-5, relative=True)


CHECKS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "pi_clip": check_few_shot, "hdmnet": check_few_shot, "bam": check_few_shot, "pfenet": check_few_shot,
    "hsnet": check_hsnet, "imr_hsnet": check_imr_hsnet, "clip_rn50_cam": check_clip, "weclip": check_weclip,
    "clip_rc": check_clip_rc,
    "insid3": check_insid3, "sclip": check_ovs, "naclip": check_ovs, "clearclip": check_ovs, "proxyclip": check_ovs,
}  # fmt: skip
