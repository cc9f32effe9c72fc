"""How labels enter the network: classes behind one interface, chosen by name. The name is saved in the checkpoint.

Each takes multi-hot labels (B, K), zeroed where dropped, and keep (B,) bool. It gives an embedding (B, E), which is
added to the time's and enters every block, and tokens (B, K, E) that attention sees. `input_channels` label
channels join the picture.
"""

import torch
from torch import Tensor, nn

from shared.options import ConditioningName


class LabelEmbedding(nn.Module):
    """One learned vector for each label present, one for each absent, and one for labels dropped."""

    input_channels = 0

    def __init__(self, num_labels: int, embedding: int) -> None:
        super().__init__()
        self.present = nn.Parameter(torch.randn(num_labels, embedding) * 0.5)
        self.absent = nn.Parameter(torch.zeros(num_labels, embedding))
        self.dropped = nn.Parameter(torch.zeros(1, embedding))
        self.mix = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

    def forward(self, labels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        there = labels[:, :, None]  # (B, K, 1)
        tokens = there * self.present + (1 - there) * self.absent
        tokens = torch.where(keep[:, None, None], tokens, self.dropped)
        return self.mix(torch.where(keep[:, None], labels @ self.present, self.dropped)), tokens


class LabelChannels(nn.Module):
    """The report's other conditioning: labels spread over the picture as input channels; blocks see only time."""

    def __init__(self, num_labels: int, embedding: int) -> None:
        super().__init__()
        self.input_channels = num_labels
        self.embedding = embedding

    def forward(self, labels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        B, K = labels.shape
        return labels.new_zeros(B, self.embedding), labels.new_zeros(B, K, self.embedding)


class PositionMap(nn.Module):
    """Labels at their positions: a learned vector for each, spread as a Gaussian around it and added up.

    A position far outside (`layouts.OUTSIDE`) adds nothing.
    """

    SPREAD = 0.045  # standard deviation in fractions of the picture's side: about an object's half-width

    def __init__(self, num_labels: int, channels: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(num_labels, channels) * 0.5)

    def forward(self, labels: Tensor, positions: Tensor, height: int, width: int) -> Tensor:
        """labels (B, K), positions (B, K, 2) -> (B, C, H, W), channels last."""
        at = positions.float()
        across = self._bump(at[..., 0], width)  # (B, K, W)
        down = self._bump(at[..., 1], height) * labels[..., None]  # (B, K, H)
        bumps = down.mT[:, :, None] * across.mT[:, None]  # (B, H, W, K)
        return (bumps.to(self.vectors.dtype) @ self.vectors).permute(0, 3, 1, 2)

    def _bump(self, centre: Tensor, cells: int) -> Tensor:
        middles = (torch.arange(cells, device=centre.device) + 0.5) / cells
        return torch.exp(-0.5 * ((middles - centre[..., None]) / self.SPREAD) ** 2)


CONDITIONINGS: dict[ConditioningName, type[LabelEmbedding] | type[LabelChannels]] = {
    "embedding": LabelEmbedding,
    "channels": LabelChannels,
}
