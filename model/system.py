"""The contract of every system. train.py and test.py know nothing else about a model."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util.cache import TensorCache
from util.config import Method, Train
from util.data.folds import ClassNames
from util.data.transforms import Placed
from util.errors import UserError
from util.run.identity import Facts
from util.score.crf import Crf
from util.score.metrics import vote
from util.score.task import Task

AT_ONCE = 2**26  # scores at file size: 256 MiB


@dataclass
class Prediction:
    """Result of `System.predict` for B episodes or images, all fp32."""

    final: Tensor  # B classes h w, scores whose argmax is the prediction (2 classes in few-shot systems); any height and width
    meta: Tensor | None = None  # B 2 h w, the few-shot branch alone
    base: Tensor | None = None  # B N+1 h w, base learner logits
    maps: dict[str, Tensor] = field(default_factory=dict)  # name -> B h w, what a report shows
    priors: tuple[str, ...] = ()  # those of the maps that are priors, in 0..1: a report shows how good each is alone
    baselines: dict[str, Tensor] = field(default_factory=dict)  # name -> B h w bool, trivial predictions to compare with
    variants: dict[str, Tensor] = field(default_factory=dict)  # name -> B classes h w, other scores: more rows of one result
    crf: Crf | None = None  # the paper's CRF on top of `final`, for those who ask for it
    votes: Tensor | None = None  # B K 2 h w, logits of each shot where shots vote; `final` is near the vote
    logits: bool = True  # a softmax makes probabilities of `final`; else its scores lie in 0..1 already

    def decide(self, i: int, placed: Placed) -> Tensor:
        """Return the labels of sample i at file size, H W int64: the class of the best score (the first of equal ones), or the
        vote of the shots. Classes are taken some at a time, so that a large image of many classes fits into memory."""
        if self.votes is not None:
            return vote(placed.restore(self.votes[i]).argmax(1))
        at_once = max(1, AT_ONCE // (placed.canvas[0] * placed.canvas[1]))
        best = label = None
        for first in range(0, self.final.shape[1], at_once):
            score, which = placed.restore(self.final[i, first : first + at_once]).max(0)
            if best is None:
                best, label = score, which
            else:
                better = score > best
                best, label = torch.where(better, score, best), torch.where(better, which + first, label)
        return label

    def confidence(self, i: int, placed: Placed) -> Tensor:
        """Return the probability of the best class of sample i, as the network's grid has it, at file size: H W in 0..1."""
        scores = self.final[i].float()
        return placed.restore((scores.softmax(0) if self.logits else scores.clamp(0, 1)).amax(0, keepdim=True))[0]


class Frozen(nn.Module):
    """Hold a part that is never trained: no gradient, eval mode survives `.train()`.

    No `no_grad` block is needed: autograd records nothing where neither parameter nor input asks for a gradient.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class System(nn.Module):
    """A model with its losses. `losses` calls `head`, so that DDP sees it; `predict` calls `trained`, which never waits.

    Attributes:
        task: its data and scores; facts: what programs must know about it; Options: its own options, a dataclass.

    Everything trained lives in `head`, everything frozen in `Frozen` children. Only `head` is wrapped by DDP, handed to
    the optimizer and saved, so frozen parts are outside all three by construction.
    """

    task: ClassVar[type[Task]]
    facts: ClassVar[Facts] = Facts()
    Options: ClassVar[type[Method]] = Method
    optimizer_name: ClassVar[str] = "sgd"  # the paper's: sgd | adam | adamw
    dilated: ClassVar[bool] = True  # its backbone keeps stride 8 in its last stages
    head: nn.Module
    prior_names: list[str] | None = None
    clip_patch: int | None = None  # where the system reads images for CLIP: CLIP's patch side (the image's, for a CAM)
    vocabulary: str = ""  # texts that it trains with, where CLIP.vocabulary does not say it
    warnings: tuple[str, ...] = ()  # what disqualifies its scores
    mark: str = ""  # short form of it, put on every line with a score

    @property
    def reads_text(self) -> bool:
        """Return whether class texts compete in its predictions, so that the vocabulary matters."""
        return False

    def losses(self, batch: Any, step: int = 0) -> dict[str, Tensor]:
        """Return weighted loss terms by name; their sum is the loss. step: number of training steps already done."""
        raise NotImplementedError

    def predict(self, batch: Any, baselines: bool = False) -> Prediction:
        """Predict without gradient; with `baselines` also give the trivial predictions."""
        raise NotImplementedError

    def remember(self, cache: TensorCache, fixed_head: bool) -> None:
        """Let evaluation keep results that depend on one image in a cache; a system without such results ignores it.

        Args:
            fixed_head: the trained part does not change any more (testing), so its results for one image are kept too.
        """

    def use_classes(self, given: ClassNames, cache: Path | None = None) -> None:
        """Predict these classes from now on, channel c the c-th; `warnings` say so.

        Args:
            cache: folder for text banks.
        Raises:
            UserError: the trained part is bound to its own classes; no class, a name twice, a text that CLIP cannot read.
        """
        raise UserError("it knows the classes that it was trained with and no others; other classes are for systems that read "
                        "names (zero-shot)")

    def check_batch(self, size: int, processes: int, device: torch.device) -> str:
        """Return a warning about training with `size` samples in each process, or "". Raises UserError where that cannot work."""
        return ""

    def measured(self) -> dict[str, float]:
        """Return values for the training curves, gathered since the last call, by name; {} where there is nothing new."""
        return {}

    def panels(self, batch: Any) -> dict[str, Tensor]:
        """Return further pictures of samples, by name, for a report: B h w float maps, or B H W uint8 labels (channels, 255)."""
        return {}

    def stages(self, batch: Any) -> dict[str, dict[str, Tensor]]:
        """Return named tensors at every stage of a prediction, in order, which `model.verify` compares later."""
        return {"data": batch.tensors(), "scores": {"final": self.predict(batch).final}}

    def groups(self, train: Train) -> list[dict[str, Any]]:
        """Return parameter groups with rates and decays of their own; the schedule scales each group's initial rate."""
        return [{"params": list(self.trained.parameters())}]

    def optimizer(self, train: Train) -> torch.optim.Optimizer:
        """Return the paper's optimizer; `Train.optimizer: adamw` replaces it for trainings too short for SGD."""
        groups = self.groups(train)
        common = {"lr": train.base_lr, "weight_decay": train.weight_decay, "fused": groups[0]["params"][0].is_cuda}
        name = self.optimizer_name if train.optimizer == "paper" else train.optimizer
        if name == "sgd":
            return torch.optim.SGD(groups, momentum=train.momentum, **common)
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](groups, **common)

    def encoders(self, training: bool) -> list[nn.Module]:
        """Return the encoders that start from ImageNet weights: the frozen ones; in training also the trained ones."""
        return []

    def load_before(self, state: Mapping[str, Tensor], name: str) -> None:
        """Load the trained part of the run that came before (`facts.before`)."""
        raise NotImplementedError

    def official_name(self, name: str) -> str | None:
        """Return the published checkpoint's key of a name in our state dict; None for a tensor that is not in it."""
        raise NotImplementedError

    # What all systems share.

    def distribute(self, device: torch.device) -> None:
        """Wrap the trained part for data-parallel training."""
        cuda = device.type == "cuda"
        head = nn.SyncBatchNorm.convert_sync_batchnorm(self.head) if cuda else self.head
        self.head = DistributedDataParallel(head, device_ids=[device] if cuda else None)

    @property
    def trained(self) -> nn.Module:
        """Return the trained part without the DDP wrapper."""
        return self.head.module if isinstance(self.head, DistributedDataParallel) else self.head

    def trained_state(self) -> dict[str, Tensor]:
        return self.trained.state_dict()

    def load_trained(self, state: Mapping[str, Tensor], name: str) -> None:
        """Load a trained part; every tensor must be there with its shape.

        Raises:
            UserError: lists what differs.
        """
        load_exactly(self.trained, state, name)

    def frozen_hashes(self) -> dict[str, str]:
        """Return a content hash of each frozen part, which checkpoints record."""
        return {name: content_hash(child) for name, child in self.named_children() if isinstance(child, Frozen)}

    def import_official(self, state: Mapping[str, Tensor], name: str = "checkpoint") -> None:
        """Load a published checkpoint, frozen parts included, completely or not at all.

        "module." prefixes are accepted. Tensors of a frozen CLIP inside are left out when they equal the CLIP in use.

        Raises:
            UserError: missing, surplus or differently shaped tensors, or another CLIP inside.
        """
        state = {key.removeprefix("module."): value for key, value in state.items()}
        own = self.state_dict()
        names = {ours: official for ours in own if (official := self.official_name(ours)) is not None}
        surplus = self._check_foreign({k: v for k, v in state.items() if k not in set(names.values())}, name)
        renamed = {ours: state[official] for ours, official in names.items() if official in state}
        untouched = {ours: value for ours, value in own.items() if ours not in names}
        load_exactly(self, renamed | untouched | surplus, name, names)

    def check_classes(self, classes: Sequence[str], name: str = "checkpoint") -> None:
        """Raise UserError where a published checkpoint names other classes than the data set has; few record any."""

    def _check_foreign(self, foreign: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """Return those of the tensors without a place here that are an error."""
        return foreign


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], name: str, names: Mapping[str, str] | None = None) -> None:
    """Load a state dict strictly, with a readable error; BatchNorm step counters may be missing."""
    own = module.state_dict()
    names = names or {}
    missing = [names.get(k, k) for k in own if k not in state and not k.endswith("num_batches_tracked")]
    surplus = [k for k in state if k not in own]
    shapes = [f"{names.get(k, k)} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
              for k in own if k in state and state[k].shape != own[k].shape]
    if missing or surplus or shapes:
        parts = [f"{len(items)} {what}: {', '.join(items[:4])}{', ...' if len(items) > 4 else ''}"
                 for what, items in (("missing", missing), ("not part of this model", surplus), ("of another shape", shapes))
                 if items]
        raise UserError(f"{name} does not fit this model, nothing was loaded. " + "; ".join(parts)
                        + ". Check the system (ARCH), Method.backbone, Train.shot, Train.split and the data set")
    module.load_state_dict({k: state.get(k, v) for k, v in own.items()})


def content_hash(module: nn.Module) -> str:
    """Return a short sha256 over names and values of a module's state."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
