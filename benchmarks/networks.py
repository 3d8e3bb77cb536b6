"""The networks whose training steps are measured, the images they see, and masks for them, made once and kept."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grasp_sparse.costs import weight_costs
from grasp_sparse.criteria import score
from grasp_sparse.masks import MaskSet
from grasp_sparse.pruning import make_masks
from grasp_sparse.train.data.fashion_mnist import load_fashion_mnist
from grasp_sparse.train.data.images import class_balanced
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.models import ResNet32, vgg19

SIDE = 32  # pixels, as the images are kept
PER_CLASS = 10  # images that GraSP scores on, as the paper does for CIFAR-10
_KEPT_PER_CLASS = 64


def mlp() -> nn.Module:
    """3072 -> 4096 -> 4096 -> 10."""
    return nn.Sequential(nn.Linear(3072, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))


def resnet50() -> nn.Module:
    from torchvision import models  # a second to import

    return models.resnet50()


@dataclass(frozen=True)
class Network:
    """`side` of its square images, None for flattened ones of SIDE pixels; `micro_batch` images scored at a time."""

    name: str
    make: Callable[[], nn.Module]
    batch: int
    side: int | None
    micro_batch: int | None = None

    def input(self, images: Tensor) -> Tensor:
        """Images [N, 3, SIDE, SIDE] as the network takes them."""
        if self.side is None:
            return images.flatten(1)
        return images if self.side == SIDE else F.interpolate(images, size=(self.side, self.side), mode="bilinear", antialias=True)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.make()


NETWORKS = (
    Network("vgg19", vgg19, 128, SIDE),
    Network("resnet32", ResNet32, 128, SIDE),
    Network("resnet50", resnet50, 32, 224, micro_batch=10),
    Network("mlp", mlp, 256, None),
)
# Two of them on smaller batches.
QUICK = (Network("resnet32", ResNet32, 32, SIDE), Network("mlp", mlp, 64, None))


@dataclass(frozen=True)
class Images:
    """Real images, normalised, float32 [N, 3, SIDE, SIDE] with their classes [N]; `name` says which."""

    name: str
    images: Tensor
    labels: Tensor

    def batch(self, network: Network, seed: int) -> tuple[Tensor, Tensor]:
        """A training batch of different images."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))[: network.batch]
        return network.input(self.images[order]), self.labels[order]

    def scoring(self, network: Network, seed: int) -> tuple[Tensor, Tensor]:
        """PER_CLASS images of each class, classes interleaved."""
        chosen = class_balanced(self.labels, PER_CLASS, seed)
        return network.input(self.images[chosen]), self.labels[chosen]


def add_networks(to: argparse.ArgumentParser) -> None:
    names = [network.name for network in NETWORKS]
    to.add_argument("--model", nargs="+", choices=names, default=names, help="default: all")
    to.add_argument("--data-dir", metavar="DIR", help="images as DIR/train/<class>/*.jpg (default: Fashion-MNIST)")
    to.add_argument("--data-name", metavar="NAME", help="what the rows call these images (default: the folder's name)")


def chosen(options: argparse.Namespace) -> tuple[list[Network], Images]:
    """By the flags of :func:`add_networks`, and --quick."""
    networks = [network for network in (QUICK if options.quick else NETWORKS) if network.name in options.model]
    return networks, load_images(options.data_dir, options.data_name)


def load_images(data_dir: str | None, name: str | None = None) -> Images:
    """From `data_dir`/train/<class>/*.jpg, named `name` or like the folder; without one Fashion-MNIST in three equal channels.

    Raises UserError when there are none.
    """
    if data_dir is None:
        splits, _ = load_fashion_mnist(None)
        images, labels = splits["train"]
        images, labels = images[: 10 * _KEPT_PER_CLASS], labels[: 10 * _KEPT_PER_CLASS]
        large = F.interpolate(images.float() / 255, size=(SIDE, SIDE), mode="bilinear")
        name, images = name or "Fashion-MNIST", large.expand(-1, 3, -1, -1)
    else:
        name, (images, labels) = name or Path(data_dir).resolve().name, _folder(Path(data_dir) / "train")
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    return Images(name, ((images - mean) / std).contiguous(), labels)


def _folder(root: Path) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    prepare = v2.Compose([v2.ToImage(), v2.Resize((SIDE, SIDE)), v2.ToDtype(torch.float32, scale=True)])
    try:
        folder = ImageFolder(str(root), transform=prepare)
    except FileNotFoundError as error:
        raise UserError(f"Expected --data-dir to hold train/<class>/*.jpg, got {root.parent}: {str(error).splitlines()[0]}") from error
    labels = torch.tensor(folder.targets)
    chosen = class_balanced(labels, _KEPT_PER_CLASS, 0).tolist()
    return torch.stack([folder[i][0] for i in chosen]), labels[chosen]


def masks_of(
    network: Network, images: Images, wanted: list[tuple[str, float]], folder: Path, seed: int
) -> dict[tuple[str, float], MaskSet]:
    """GraSP's masks for each (budget, sparsity): read from `folder`, or scored once for all of them and kept there."""
    data = re.sub(r"[^a-z0-9]+", "-", images.name.lower()).strip("-")
    paths = {case: folder / f"{network.name}-{data}-{case[0]}-{case[1]:g}-seed{seed}.safetensors" for case in wanted}
    model = network.model(seed)
    if not all(path.is_file() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        x, y = images.scoring(network, seed)
        scores = score(model, [(x, y)], "grasp", micro_batch_size=network.micro_batch)
        costs = weight_costs(model, x[:1])
        for (budget, sparsity), path in paths.items():
            recipe = {"criterion": "grasp", "data": images.name, "budget": budget, "sparsity": sparsity, "seed": seed}
            make_masks(scores, sparsity, budget=budget, costs=costs, recipe=recipe).save(path)
    masks = {case: MaskSet.load(path) for case, path in paths.items()}
    for found in masks.values():
        found.check(model)
    return masks
