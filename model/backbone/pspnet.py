"""The base learner as a system of its own: ARCH=PSPNet trains it for a fold, few-shot systems then freeze it."""

import torch
from torch import Tensor

from model.backbone.base_learner import BaseLearner
from model.losses import segmentation_loss
from model.ops import resize
from model.system import Prediction, System
from util.data.semantic import SemanticBatch


class PSPNet(System):
    """Semantic segmentation of background + base classes; everything is trained, BatchNorm included (BAM Sec. 4.1)."""

    task = "images"

    def __init__(self, learner: BaseLearner):
        super().__init__()
        self.head = learner

    def losses(self, batch: SemanticBatch) -> dict[str, Tensor]:
        return {"main": segmentation_loss(self.head(batch.image), batch.label.long())}

    @torch.no_grad()
    def predict(self, batch: SemanticBatch, baselines: bool = False) -> Prediction:
        return Prediction(final=resize(self.trained(batch.image).float(), batch.image.shape[2:]))

    def official_name(self, name: str) -> str | None:
        return name.removeprefix("head.").replace("encoder.stages.", "layer", 1)
