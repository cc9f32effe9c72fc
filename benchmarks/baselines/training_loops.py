"""Other training loops for the same network and data: the course report's as written, and diffusers'.

Both decode pictures with PIL in the loop. They call `on_step` after each step, return after `steps` and save nothing.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from benchmarks.baselines.samplers import betas_of
from shared.diffusion.schedules import alpha_bar as make_alpha_bar
from shared.diffusion.unet import UNet
from shared.vocabulary import Vocabulary, read_train_file
from trainer.config import TrainConfig


class Folder(TorchDataset[tuple[Tensor, Tensor]]):
    """Pictures and labels of a folder, decoded on access."""

    def __init__(self, folder: Path, size: int) -> None:
        self.vocabulary = Vocabulary(tuple(json.loads((folder / "objects.json").read_text())))
        self.items = list(read_train_file(folder / "train.json", self.vocabulary).items())
        self.pictures = folder / "iclevr"
        self.transform = transforms.Compose(
            [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        name, labels = self.items[i]
        picture: Tensor = self.transform(Image.open(self.pictures / name).convert("RGB"))
        return picture, torch.tensor(self.vocabulary.multi_hot(labels), dtype=torch.float32)


def endless(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever. ValueError if an epoch has no full batch."""
    if not len(loader):
        raise ValueError(f"the folder has fewer pictures than a batch of {loader.batch_size}")
    while True:
        yield from loader


def report_loop(
    network: UNet, folder: Path, config: TrainConfig, steps: int, on_step: Callable[[], None] = lambda: None
) -> None:
    """The course report's loop: fp32, eps, labels dropped for the whole batch, EMA by a Python loop over parameters."""
    alpha_bar = make_alpha_bar("sigmoid", 1000).float()
    loader = DataLoader(Folder(folder, config.image_size), batch_size=config.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    for _, (x, labels) in zip(range(steps), endless(loader), strict=False):
        t = torch.randint(1, 1000, (len(x),))
        noise = torch.randn_like(x)
        ab = alpha_bar[t][:, None, None, None]
        keep = torch.full((len(x),), random.random() >= 0.1)
        predicted = network(ab.sqrt() * x + (1 - ab).sqrt() * noise, t, labels, keep)
        loss = F.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for averaged, parameter in zip(average.parameters(), network.parameters(), strict=True):
            averaged.data = averaged.data * 0.995 + (1 - 0.995) * parameter.data
        on_step()


def diffusers_loop(
    network: UNet,
    folder: Path,
    config: TrainConfig,
    steps: int,
    mixed_precision: str,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """diffusers' unconditional training script, plus labels: accelerate, DDPMScheduler, EMAModel, AdamW.

    `mixed_precision`: "no", the script's default, or "bf16".
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # else the first loop's precision applies to all
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.cuda.is_available())
    scheduler = DDPMScheduler(trained_betas=betas_of(make_alpha_bar("cosine", 1000)), prediction_type="epsilon")
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        Folder(folder, config.image_size), batch_size=config.batch, shuffle=True, drop_last=True
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    rate = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=500, num_training_steps=100_000)
    model: nn.Module
    model, optimizer, loader, rate = accelerator.prepare(network, optimizer, loader, rate)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for _, (clean, labels) in zip(range(steps), endless(loader), strict=False):
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
        noisy = scheduler.add_noise(clean, noise, t)
        keep = torch.rand(len(clean), device=clean.device) >= 0.1
        with accelerator.accumulate(model):
            predicted = model(noisy, t, labels, keep)
            loss = F.mse_loss(predicted.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        average.step(network.parameters())
        on_step()
