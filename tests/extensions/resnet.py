"""A ResNet classifier (He et al. 2015, arXiv 1512.03385) with live batch norms, by torchvision."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from common.types import Positive


class Classifier(nn.Module):
    """ResNet with a stem for small images: one 3 x 3 convolution, and no pooling."""

    def __init__(self, *, classes: int, channels: int, image_size: tuple[int, int], blocks: list[Positive]):
        super().__init__()
        self.net = ResNet(BasicBlock, blocks, num_classes=classes)
        self.net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) -> logits (B, K)."""
        logits: Tensor = self.net(images)
        return logits
