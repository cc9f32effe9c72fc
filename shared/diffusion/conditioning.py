"""How labels enter the network: classes with one interface, chosen by the name that the checkpoint stores.

Each takes multi-hot labels (B, K), zeroed where dropped, and keep (B,) bool. It returns an embedding (B, E), which is
added to the time embedding and enters every block, and tokens (B, K, E), which attention sees. `input_channels` is the
number of label channels that are concatenated to the picture.
"""

import torch
from torch import Tensor, nn

from shared.device import initial_weights
from shared.options import ConditioningName


class LabelEmbedding(nn.Module):
    """One learned vector for each present label, one for each absent label, and one for dropped labels."""

    input_channels = 0

    def __init__(self, num_labels: int, embedding: int) -> None:
        super().__init__()
        self.present = nn.Parameter(initial_weights(num_labels, embedding, std=0.5))
        self.absent = nn.Parameter(torch.zeros(num_labels, embedding))
        self.dropped = nn.Parameter(torch.zeros(1, embedding))
        self.mix = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

    def forward(self, labels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        there = labels[:, :, None]  # (B, K, 1)
        present = there * self.present  # (B, K, E)
        tokens = torch.where(keep[:, None, None], present + (1 - there) * self.absent, self.dropped)
        # not a matrix product, which adds many labels in another order for one row than for many
        return self.mix(torch.where(keep[:, None], present.sum(1), self.dropped)), tokens


class LabelChannels(nn.Module):
    """The course report's other conditioning: one constant input channel per label; blocks see the time only."""

    def __init__(self, num_labels: int, embedding: int) -> None:
        super().__init__()
        self.input_channels = num_labels
        self.embedding = embedding

    def forward(self, labels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        B, K = labels.shape
        return labels.new_zeros(B, self.embedding), labels.new_zeros(B, K, self.embedding)


class PositionMap(nn.Module):
    """Labels at their positions: the sum of one learned vector per label, weighted by a Gaussian around its position.

    A position far outside the picture (`layouts.OUTSIDE`) adds nothing. `spread`: the Gaussian's standard deviation as
    a fraction of the picture's side; about half an object's width. `rotations`: whether two more vectors of each label
    are added, weighted by cosine and sine of its object's rotation.
    """

    def __init__(self, num_labels: int, channels: int, spread: float, *, rotations: bool = False) -> None:
        super().__init__()
        self.spread = spread
        self.vectors = nn.Parameter(initial_weights(num_labels, channels, std=0.5))
        self.rotations = nn.Parameter(torch.zeros(2, num_labels, channels)) if rotations else None

    def forward(self, labels: Tensor, places: Tensor, rotations: Tensor | None, height: int, width: int) -> Tensor:
        """labels (B, K), places and rotations (B, K, 2) -> (B, C, H, W), channels last."""
        places = places.float()
        vectors: Tensor = self.vectors
        across = self._bump(places[..., 0], width)  # (B, K, W)
        down = self._bump(places[..., 1], height) * labels[..., None]  # (B, K, H)
        if self.rotations is not None and rotations is not None:
            cosine, sine = rotations[..., None].to(vectors.dtype).unbind(-2)  # (B, K, 1)
            vectors = vectors + cosine * self.rotations[0] + sine * self.rotations[1]  # (B, K, C)
        bumps = down.transpose(-2, -1)[:, :, None] * across.transpose(-2, -1)[:, None]  # (B, H, W, K)
        placed: Tensor = bumps.to(vectors.dtype).flatten(1, 2) @ vectors  # (B, H * W, C)
        return placed.view(-1, height, width, vectors.shape[-1]).permute(0, 3, 1, 2)

    def _bump(self, centre: Tensor, cells: int) -> Tensor:
        middles = (torch.arange(cells, device=centre.device) + 0.5) / cells
        return torch.exp(-0.5 * ((middles - centre[..., None]) / self.spread) ** 2)


CONDITIONINGS: dict[ConditioningName, type[LabelEmbedding] | type[LabelChannels]] = {
    "embedding": LabelEmbedding,
    "channels": LabelChannels,
}
