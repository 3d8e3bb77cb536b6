"""How the ranks of a run divide the images of a step among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data.images import Share, generator_for
from grasp_sparse.train.data.sets import Data
from grasp_sparse.train.distributed import Ranks
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.streams import seed_streams

_RANK = 4  # beside the streams of order, augmentation and sampling


def images_per_step(config: TrainConfig, ranks: Ranks) -> int:
    """Images between two updates, of all ranks and micro-batches."""
    return config.batch_size * config.accumulate * ranks.size


def step_in_words(batch_size: int, accumulate: int, ranks: int) -> str:
    """(16, 2, 4) -> "4 ranks x batch 16 x 2 micro-batches = 128 images a step"."""
    of_ranks, of_parts = f"{ranks} rank{'s' * (ranks != 1)}", f"{accumulate} micro-batch{'es' * (accumulate != 1)}"
    return f"{of_ranks} x batch {batch_size} x {of_parts} = {batch_size * accumulate * ranks:,} images a step"


def regrouped(config: TrainConfig, recipe: TrainConfig, saved: int, ranks: Ranks) -> TrainConfig:
    """The settings of a run of `saved` ranks for those there are now: a step has the same images, divided in another way.

    The batch of a rank does not grow above that of the `recipe` that the run was started with, so neither does its memory. It
    comes back to it, as do CUDA graphs, where the ranks do: the graphs go off only for as long as micro-batches rule them out. Sums
    are taken in another order and batch norms see other batches, so the run goes on as well as before but not to the same bits.

    Raises UserError when the images cannot be divided, and for settings that are not good.
    """
    if saved == ranks.size:
        return config
    images = images_per_step(config, Ranks(size=saved))
    each, rest = divmod(images, ranks.size)
    if rest:
        raise UserError(
            f"Expected a number of ranks that divides the {images} images of a step, got {ranks.size}; the run had {saved}"
        )
    largest = min(each, max(config.batch_size, recipe.batch_size))
    batch_size = next(size for size in range(largest, 0, -1) if each % size == 0)
    accumulate = each // batch_size
    graphs = recipe.cuda_graphs and accumulate == 1
    return dataclasses.replace(config, batch_size=batch_size, accumulate=accumulate, cuda_graphs=graphs).validate()


def rate_advice(config: TrainConfig, recipe: TrainConfig, ranks: Ranks) -> str | None:
    """What to try where a step of `config` has other images than one of the `recipe` in one process, whose rate it keeps.

    SGD's rate grows as the images do (Goyal et al., arXiv:1706.02677), AdamW's as their square root (Malladi et al.,
    arXiv:2205.10287). None where there is nothing to say.
    """
    images, meant = images_per_step(config, ranks), images_per_step(recipe, Ranks())
    if images == meant or config.lr != recipe.lr:
        return None
    scaled = config.lr * (images / meant) ** (1.0 if config.optimizer == "sgd" else 0.5)
    ways = [f"--lr {scaled:.3g}" + (" with some --warmup" if images > meant and not config.warmup else "")]
    if meant % ranks.size == 0:
        same = regrouped(recipe, recipe, 1, ranks)
        ways.insert(0, f"--batch-size {same.batch_size} --accumulate {same.accumulate} for the same step")
    return (
        f"a step has {images:,} images, and {meant:,} in the recipe as it is, in one process; if its learning rate of "
        f"{config.lr:g} is for those, give {', or '.join(ways)}"
    )


def seed_rank(seed: int, rank: int, *where: int) -> None:
    """Give each rank random streams of its own (dropout); rank 0 keeps those it has."""
    if rank:
        seed_streams(generator_for(seed, _RANK, rank, *where).initial_seed())


def train_batches(config: TrainConfig, data: Data, epoch: int, first_step: int, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's images of each step of an epoch, from `first_step` on."""
    each, share = config.batch_size * config.accumulate, Share(ranks.rank, ranks.size)
    return data.train.shuffled(each, config.seed, epoch, first_step, config.augment, share)


def evaluation_batches(config: TrainConfig, data: Data, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of the test images."""
    return data.test.in_order(2 * config.batch_size, Share(ranks.rank, ranks.size))
