"""CLIP's ResNet image tower (RN50), for class activation maps: the trunk without its pooling, and the pooling alone."""

from torch import Tensor, nn

from model.clip.trunk import STATISTICS
from model.ops import Pixels


class ResNetTower(nn.Module):
    """The image tower of a CLIP model, `visual` being open_clip's ModifiedResNet."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual
        self.normalise = Pixels(*STATISTICS["clip"])

    @property
    def side(self) -> int:
        """Side of its square input in pixels."""
        size = self.visual.image_size
        return size if isinstance(size, int) else size[0]

    def activation(self, normalised: Tensor) -> Tensor:
        """Return the last block's output: N 3 s s -> N C s/32 s/32."""
        v = self.visual
        return v.layer4(v.layer3(v.layer2(v.layer1(v.stem(normalised)))))

    def pool(self, activation: Tensor) -> Tensor:
        """N C s/32 s/32 -> N D, not normalised."""
        return self.visual.attnpool(activation)
