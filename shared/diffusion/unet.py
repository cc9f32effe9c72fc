"""The network: a UNet on blocks of pixels, with time and labels in every block. Knows no schedule and no solver.

Its layers were measured on a CPU with AMX and bf16 (docs/dev/decisions.md): layer norm over channels rather
than group norm, channels last throughout, few channels at the finest resolution and most of them at the coarse ones.
"""

import math
import operator
from typing import Annotated, Final

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from shared.device import fuses_attention, initial_weights
from shared.diffusion.conditioning import CONDITIONINGS, LabelChannels, LabelEmbedding, PositionMap
from shared.diffusion.inputs import InputEmbedding, split_labels
from shared.options import ConditioningName, Count, Natural, NoOtherFields


class NetworkConfig(NoOtherFields):
    """Everything that fixes the network's shape; saved in every checkpoint."""

    model_config = ConfigDict(frozen=True)

    num_labels: Count
    image_size: Count = 64
    image_channels: Count = 3
    block: Count = 2  # side in pixels of the block that becomes one position of the first level
    channels: tuple[Count, ...] = (64, 160, 256)  # by level; each level has half the resolution of the previous one
    encoder_blocks: tuple[Natural, ...] = (0, 2, 2)
    decoder_blocks: tuple[Count, ...] = (2, 2, 2)  # the first block of a level takes the skip connection
    attention: tuple[bool, ...] = (False, False, True)  # whether attention follows each block of the level
    head_channels: Count = 64
    embedding: Count = 256
    conditioning: ConditioningName = "embedding"
    positions: bool = False  # whether it takes the position of each label's object (`layouts.py`)
    rotations: bool = False  # and its rotation
    # Labels, by index, whose objects have no rotation in the data. Without any it is not written.
    symmetric: Annotated[tuple[Natural, ...], Field(exclude_if=operator.not_)] = ()
    spread: Annotated[float, Field(gt=0)] = 0.045  # of a position, a standard deviation in sides of the picture
    # That a whole picture is conditioned on, by name (`inputs.py`). Without any it is not written, so that versions
    # which know no inputs read the checkpoint.
    inputs: Annotated[tuple[str, ...], Field(exclude_if=operator.not_)] = ()

    def model_post_init(self, _: object) -> None:
        if not self.channels:
            raise ValueError("channels must name at least one level")
        if self.rotations and not self.positions:
            raise ValueError("rotations need positions")
        if self.symmetric and not self.rotations:
            raise ValueError("symmetric labels are for a network that takes rotations")
        if beyond := [label for label in self.symmetric if label >= self.num_labels]:
            raise ValueError(f"symmetric labels {beyond} of {self.num_labels}")
        if not len(self.channels) == len(self.encoder_blocks) == len(self.decoder_blocks) == len(self.attention):
            raise ValueError("channels, encoder_blocks, decoder_blocks and attention must be equally long")
        if self.image_size % (unit := self.block * 2 ** (len(self.channels) - 1)):
            raise ValueError(f"image_size {self.image_size} must be a multiple of {unit}: block x 2^(levels - 1)")
        if self.embedding % 2:
            raise ValueError(f"embedding {self.embedding} must be even: half sines, half cosines of the time")
        for width, attention in zip(self.channels, self.attention, strict=True):
            if attention and width % max(1, width // self.head_channels):
                raise ValueError(f"{width} channels do not divide into heads of about {self.head_channels}")


class Conv(nn.Module):
    """A convolution whose weight is stored as a matrix (out, k * k * in), which is also its channels-last layout.

    Muon trains matrices only. A kernel as large as its stride is traced as a product of blocks of pixels: OpenVINO's
    own kernel for it rounds differently for one row and for many on some CPUs.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1, *, dilation: int = 1, zero: bool = False
    ) -> None:
        super().__init__()
        self.shape, self.stride, self.dilation = (c_out, kernel, kernel, c_in), stride, dilation
        self.padding = dilation * ((kernel - stride + 1) // 2)
        fan_in = kernel * kernel * c_in
        weight = torch.zeros(c_out, fan_in) if zero else initial_weights(c_out, fan_in, std=fan_in**-0.5)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        weight = self.weight.view(self.shape).permute(0, 3, 1, 2)
        out, kernel = self.shape[:2]
        if is_tracing() and self.stride == kernel > 1:
            return F.conv2d(F.pixel_unshuffle(x, kernel), weight.reshape(out, -1, 1, 1), self.bias)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position, (B, C, H, W).

    Traced, it is spelled out, for OpenVINO would transpose what torch's layer norm takes, for a sixth of all its time.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if is_tracing():
            centred = x - x.mean(1, keepdim=True)
            variance = (centred * centred).mean(1, keepdim=True)
            return centred * (variance + 1e-5).rsqrt() * self.weight[:, None, None] + self.bias[:, None, None]
        normed: Tensor = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias)
        return normed.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Norm, conv, scale and shift by the embedding, and a conv initialised to zero (Dhariwal & Nichol 2021, sec. 3)."""

    def __init__(self, c_in: int, c_out: int, embedding: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(c_in)
        self.conv1, self.conv2 = Conv(c_in, c_out), Conv(c_out, c_out, zero=True)
        self.modulation = nn.Linear(embedding, 2 * c_out)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.skip = Conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(torch.addcmul(shift, h, 1 + scale)))
        out: Tensor = self.skip(x) + h
        return out


class Attention(nn.Module):
    """Self-attention over positions, with the labels' tokens as additional keys and values."""

    def __init__(self, channels: int, embedding: int, head_channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.token_kv = nn.Linear(embedding, 2 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:  # (B, C, H, W), (B, K, E)
        B, C, H, W = x.shape
        flat = x.permute(0, 2, 3, 1).reshape(B, H * W, C)
        q, k, v = self.qkv(self.norm(flat)).chunk(3, dim=-1)
        token_k, token_v = self.token_kv(tokens).chunk(2, dim=-1)
        k, v = torch.cat([k, token_k], 1), torch.cat([v, token_v], 1)
        q, k, v = (y.view(B, -1, self.heads, C // self.heads).transpose(1, 2) for y in (q, k, v))
        mixed: Tensor  # (B, heads, H W, C / heads)
        if fuses_attention(x.device) and not is_tracing():
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        mixed = self.out(mixed.transpose(1, 2).reshape(B, H * W, C))
        return x + mixed.view(B, H, W, C).permute(0, 3, 1, 2)


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if the level has it."""

    def __init__(self, widths: list[tuple[int, int]], config: NetworkConfig, attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(c_in, c_out, config.embedding) for c_in, c_out in widths)
        self.attentions = nn.ModuleList(
            Attention(c_out, config.embedding, config.head_channels) if attention else nn.Identity()
            for _, c_out in widths
        )

    def forward(self, h: Tensor, embedding: Tensor, tokens: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = block(h, embedding)
            if isinstance(attention, Attention):
                h = attention(h, tokens)
        return h


def is_tracing() -> bool:
    """Whether the network is being converted for OpenVINO."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def time_features(t: Tensor, dim: int) -> Tensor:
    """Return cosines and sines of t (B,) at geometric frequencies (Vaswani et al. 2017, sec. 3.5): (B, dim) float32."""
    frequencies = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10000) / (dim // 2)))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNet(nn.Module):
    """(x, t, labels, keep) -> prediction of x's shape. Rows with keep False drop their labels.

    labels: (B, K) multi-hot. A network with positions takes (B, K, 3), multi-hot and position; one with rotations
    (B, K, 5), multi-hot, position, cosine and sine of the rotation. One with inputs takes the columns of
    `inputs.with_inputs` in addition. Any takes (B, K), too. t: timesteps (B,), or their `time_features` (B, embedding).
    """

    edges: Final = (
        "stem",
        "head",
        "conditioning",
        "time",
        "inputs",
    )  # first and last layers, which Muon leaves to AdamW

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.num_labels = config.num_labels
        self.image_shape = (config.image_channels, config.image_size, config.image_size)
        width, c, top = config.embedding, config.channels, len(config.channels) - 1
        pixels = config.image_channels * config.block**2
        self.conditioning: LabelEmbedding | LabelChannels = CONDITIONINGS[config.conditioning](config.num_labels, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.stem = Conv(pixels + self.conditioning.input_channels, c[0])
        self.stem_positions = None
        if config.positions:
            self.stem_positions = PositionMap(config.num_labels, c[0], config.spread, rotations=config.rotations)
        self.inputs = InputEmbedding(config.inputs, width) if config.inputs else None
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        for i, blocks in enumerate(config.encoder_blocks):
            self.encoder.append(Level([(c[i], c[i])] * blocks, config, config.attention[i]))
            self.down.append(Conv(c[i], c[i + 1], 2, 2) if i < top else nn.Identity())
        self.decoder, self.up = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(top + 1)):
            first = c[i] if i == top else 2 * c[i]
            widths = [(first, c[i])] + [(c[i], c[i])] * (config.decoder_blocks[i] - 1)
            self.decoder.append(Level(widths, config, config.attention[i]))
            self.up.append(Conv(c[i], c[i - 1], 1) if i > 0 else nn.Identity())
        self.norm = ChannelNorm(c[0])
        self.head = Conv(c[0], pixels, zero=True)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        return self.paint(self.features(x, t, labels, keep))

    def paint(self, features: Tensor) -> Tensor:
        """Return the prediction that the last layer makes of `features`."""
        return F.pixel_shuffle(self.head(features), self.config.block)

    def features(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        """Return what the last layer sees: (B, channels[0], H / block, W / block)."""
        return self.last_level(*self.trunk(x, t, labels, keep))

    def last_level(self, h: Tensor, embedding: Tensor, tokens: Tensor) -> Tensor:
        """Return the features that the decoder's last level makes of what `trunk` returns."""
        return F.silu(self.norm(self.decoder[-1](h, embedding, tokens)))

    def trunk(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the decoder's last level is given: its input, the embedding and the labels' tokens."""
        hot, places, rotations, inputs = split_labels(labels, self.config)
        hot = hot * keep[:, None]  # (B, K)
        label_embedding, tokens = self.conditioning(hot, keep)
        if self.inputs is not None and inputs is not None:
            label_embedding = label_embedding + self.inputs(inputs, keep)
        features = time_features(t, self.config.embedding) if t.ndim == 1 else t
        embedding = F.silu(self.time(features) + label_embedding)
        h = F.pixel_unshuffle(x, self.config.block)
        if extra := self.conditioning.input_channels:
            h = torch.cat([h, hot[:, :extra, None, None].expand(-1, -1, *h.shape[2:])], 1)
        h = self.stem(h.contiguous(memory_format=torch.channels_last))
        if self.stem_positions is not None and places is not None:
            h = h + self.stem_positions(hot, places, rotations, *h.shape[2:])
        skips = []
        for level, down in zip(self.encoder, self.down, strict=True):
            h = level(h, embedding, tokens)
            skips.append(h)
            h = down(h)
        h = skips.pop()
        for level, up in zip(self.decoder[:-1], self.up[:-1], strict=True):
            h = F.interpolate(up(level(h, embedding, tokens)), scale_factor=2, mode="nearest")
            h = torch.cat([h, skips.pop()], 1)
        return h, embedding, tokens
