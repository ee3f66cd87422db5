"""The base learner as a system of its own: ARCH=PSPNet trains it for a fold, few-shot systems then freeze it."""

import torch
from torch import Tensor, nn

from model.backbone.base_learner import BaseLearner
from model.losses import segmentation_loss
from model.ops import resize
from model.system import Prediction, System
from util.data.semantic import Images
from util.errors import UserError
from util.run.identity import Facts
from util.score.semantic import BaseTask


class PSPNet(System):
    """Semantic segmentation of background + base classes; everything is trained, BatchNorm included (BAM Sec. 4.1)."""

    task = BaseTask
    facts = Facts(frozen=False)

    def __init__(self, learner: BaseLearner):
        super().__init__()
        self.head = learner

    def encoders(self, training: bool) -> list[nn.Module]:
        return [self.trained.encoder] if training else []

    def check_batch(self, size: int, processes: int, device: torch.device) -> str:
        if size < 2:
            raise UserError(f"Train.batch_size = {size * processes}: BatchNorm needs at least 2 images in each process")
        if processes > 1 and device.type == "cpu":
            return "on the CPU each process normalises its own part of the batch: not the base learner of one process"
        return ""

    def losses(self, batch: Images, step: int = 0) -> dict[str, Tensor]:
        return {"main": segmentation_loss(self.head(batch.image), batch.label.long())}

    @torch.no_grad()
    def predict(self, batch: Images, baselines: bool = False) -> Prediction:
        return Prediction(final=resize(self.trained(batch.image).float(), batch.image.shape[2:]))

    def official_name(self, name: str) -> str | None:
        return name.removeprefix("head.").replace("encoder.stages.", "layer", 1)
