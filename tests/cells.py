"""Notebook cells with tricks of the reader's own, as text, and a way to run them as a notebook does."""

from __future__ import annotations

import itertools
import linecache
from typing import Any

from cifar_fast.training.tricks import Tricks

_numbers = itertools.count()

CELLS = {
    "AdamW": """
import torch

LR = 2e-3


def optimizers(model, recipe):
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=LR)]


tricks = Tricks(name="AdamW", optimizers=optimizers)
""",
    "resnet": """
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


def small_resnet(recipe, n_classes):
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=n_classes)
    net.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)  # a stem of 3x3 instead of 7x7
    net.layer2 = net.layer3 = net.layer4 = nn.Identity()
    net.fc = nn.Linear(64, n_classes)
    return net


tricks = Tricks(name="resnet18 made small", model=small_resnet)
""",
    "mixup": """
import torch
import torch.nn.functional as F


def mixup(images, labels, generator):
    share = torch.rand(len(images), 1, generator=generator).to(images)
    partner = torch.randperm(len(images), generator=generator).to(images.device)
    targets = F.one_hot(labels, 10).to(images.dtype)
    mixed = share[:, :, None, None] * images + (1 - share[:, :, None, None]) * images[partner]
    return mixed, share * targets + (1 - share) * targets[partner]


tricks = Tricks(name="mixup", augment=mixup)
""",
    "Muon": """
import torch


def orthogonal(matrix, steps=5):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class MyMuon(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(0.6).add_(p.grad)
                p.sub_(group["lr"] * orthogonal(velocity.flatten(1)).view_as(p))


def optimizers(model, recipe):
    filters = [p for p in model.parameters() if p.ndim == 4 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim != 4]
    return [MyMuon(filters, lr=0.05), torch.optim.SGD(others, lr=0.1, momentum=0.9)]


tricks = Tricks(name="own Muon", optimizers=optimizers)
""",
}


def run_cell(source: str, **variables: Any) -> dict[str, Any]:
    """Execute `source` as a notebook's `__main__`, where its functions belong to no module that can be imported."""
    name = f"<cell {next(_numbers)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "__main__", "Tricks": Tricks} | variables
    exec(compile(source, name, "exec"), namespace)
    return namespace


def tricks_of(name: str) -> Tricks:
    """Return the tricks that the cell `name` defines."""
    return run_cell(CELLS[name])["tricks"]
