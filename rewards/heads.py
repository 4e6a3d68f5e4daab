"""The head of ImageReward and of the aesthetic predictor: linear layers, nothing between."""

from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the linear layers; the others were dropout


class LinearStack(nn.Module):
    """[B, D] -> [B], under the names `layers.N` of the published files."""

    def __init__(self, width: int) -> None:
        super().__init__()
        ends = zip((width, *WIDTHS), WIDTHS, strict=False)
        self.layers = nn.Sequential(*(nn.Identity() for _ in range(PLACES[-1] + 1)))
        for i, (inputs, outputs) in zip(PLACES, ends, strict=True):
            self.layers[i] = nn.Linear(inputs, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B]."""
        return self.layers(features).squeeze(-1)
