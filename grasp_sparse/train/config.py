"""Everything a run depends on, in one flat record: a key of a TOML recipe = a field here = a flag of the command line.

Precedence: field default < recipe < flag. `TrainConfig.validate` raises before any data are read.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from grasp_sparse.choice import sparsity_under
from grasp_sparse.patterns import USAGE, get_pattern
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.tensorboard import wants_tensorboard


_MAX_THREADS = 4096
_MAX_WORKERS = 1024
_MAX_SIDE = 16384


def _option(default: Any, group: str, help: str, *, type: Any = str, **extra: Any) -> Any:
    """A field that the command line can offer as a flag: its group in --help, its text, how to parse its value."""
    metadata = {"group": group, "help": help, "type": type, **extra}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Recipe of a run. Field metadata carry help text, group and parser; see `grasp-sparse train --help`."""

    name: str = _option("train", "run", "label of the run: default folder name and first word of the last line printed")

    data: str = _option(
        "fashion-mnist", "data", "data set",
        choices=("fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet", "imagefolder", "fake"),
    )
    data_dir: str | None = _option(None, "data", "folder that holds the data, laid out as usual for the set", metavar="DIR")
    image_size: int | None = _option(
        None, "data", "side in pixels; imagenet, imagefolder (default 224) and fake (default 32) only", type=int, metavar="PIXELS"
    )
    augment: bool = _option(
        True, "data", "random shift and horizontal flip (imagenet, imagefolder: random crop, resized, and flip)", type=bool
    )
    trivial_augment: bool = _option(
        False, "data", "one more random change of colour or shape, TrivialAugmentWide (sets decoded while training)", type=bool
    )
    random_erasing: float = _option(
        0.0, "data", "chance that a random rectangle is blanked (sets decoded while training)", type=float, metavar="SHARE"
    )
    max_corrupt: int = _option(
        10, "data", "end the run when it has met more unreadable image files than this, each counted once, since its start and on all "
        "ranks, which tell one another at checkpoints; so many are replaced", type=int, metavar="N",
    )
    train_limit: int | None = _option(None, "data", "use only this many training images", type=int, metavar="N")
    test_limit: int | None = _option(None, "data", "use only this many test images", type=int, metavar="N")
    workers: int = _option(2, "data", "processes that decode images, per process that trains; 0: none", type=int, metavar="N")

    model: str = _option(
        "vgg_small", "model", "vgg_small, vgg19, resnet32, any torchvision model, timm:name, or package.module:factory"
    )
    model_args: dict = _option(
        {}, "model", "argument of the model's factory as KEY=VALUE, the value as TOML, e.g. 'widths=[128, 256]'; a recipe's others stay "
        "unless --model names another",
        type=dict, metavar="KEY=VALUE",
    )

    dense: bool = _option(False, "pruning", "train the ordinary dense model, for comparison", type=bool)
    masks: str | None = _option(None, "pruning", "use this mask file instead of scoring", metavar="FILE")
    criterion: str = _option("grasp", "pruning", "score per weight: grasp, snip, synflow, magnitude, random")
    criterion_args: dict = _option(
        {}, "pruning", "option of the criterion as KEY=VALUE, e.g. 'preset=\"paper\"' or temperature=200; a recipe's others stay "
        "unless --criterion names another", type=dict, metavar="KEY=VALUE",
    )
    sparsity: float | None = _option(
        None, "pruning", "share removed, 0 <= sparsity < 1 (default: 0.95; with pattern nm 1 - N / M)", type=float, metavar="SHARE"
    )
    budget: str = _option(
        "weights", "pruning", "what is limited: weights, flops = multiply-adds (by sparsity), or time (by speedup)",
        choices=("weights", "flops", "time"),
    )
    speedup: float | None = _option(
        None, "pruning", "budget time: dense step time / sparse step time to reach, in place of sparsity", type=float,
        metavar="FACTOR",
    )
    scope: str = _option(
        "global", "pruning", "one ranking over all layers, the same density per layer, or Erdos-Renyi densities",
        choices=("global", "layer", "erk"),
    )
    pattern: str = _option("unstructured", "pruning", f"what is kept or pruned together: {USAGE}", metavar="PATTERN")
    min_density: float = _option(0.0, "pruning", "density that no layer falls below", type=float, metavar="SHARE")
    include: list = _option([], "pruning", "prune only layers whose name matches this pattern", type=list, metavar="GLOB")
    exclude: list = _option([], "pruning", "keep layers whose name matches this pattern dense", type=list, metavar="GLOB")
    samples_per_class: int = _option(10, "pruning", "training images per class to score on", type=int, metavar="N")
    score_batch: int = _option(100, "pruning", "images per scoring micro-batch", type=int, metavar="N")
    plan: str = _option(
        "auto", "pruning", "layers run sparse where that is measured to be faster (auto), or where they are thin (density: repeatable)",
        choices=("auto", "density"),
    )
    max_density: float | None = _option(
        None, "pruning", "a layer denser than this keeps its dense kernel; nothing is measured then", type=float,
        metavar="SHARE",
    )

    epochs: int = _option(10, "training", "passes over the training images", type=int, metavar="N")
    max_seconds: float | None = _option(
        None, "training", "end training after this wall time of steps and evaluation, not counting checkpoints; the schedule shrinks to "
        "fit (then not reproducible)", type=float, metavar="S",
    )
    batch_size: int = _option(128, "training", "images per rank and micro-batch", type=int, metavar="N")
    accumulate: int = _option(1, "scale", "micro-batches per step: their gradients are added up", type=int, metavar="N")
    optimizer: str = _option("sgd", "training", "SGD with momentum, or AdamW", choices=("sgd", "adamw"))
    lr: float = _option(0.1, "training", "peak learning rate", type=float)
    momentum: float = _option(0.9, "training", "SGD momentum; AdamW: beta1", type=float)
    beta2: float = _option(0.999, "training", "AdamW: decay of the second moment", type=float)
    nesterov: bool = _option(True, "training", "Nesterov momentum", type=bool)
    weight_decay: float = _option(5e-4, "training", "L2 penalty on kept weights; AdamW: decoupled", type=float)
    schedule: str = _option(
        "cosine", "training", "cosine to zero, or divided by 10 at each milestone", choices=("cosine", "step", "constant")
    )
    milestones: list = _option(
        [0.5, 0.75], "training", "shares of training after which 'step' divides by 10", type=float, nargs="+",
        metavar="SHARE",
    )
    warmup: float = _option(0.0, "training", "share of training over which the rate climbs from 0", type=float, metavar="SHARE")
    label_smoothing: float = _option(0.0, "training", "cross-entropy label smoothing", type=float)
    memory_format: str = _option(
        "nchw", "training", "layout of input images and dense convolutions; chwn: batch innermost, which sparse convolutions keep and dense ones do not",
        choices=("nchw", "channels_last", "chwn"),
    )
    clip_norm: float | None = _option(
        None, "training", "scale gradients down to this norm, all together, where theirs is larger", type=float, metavar="NORM"
    )
    ema_decay: float | None = _option(
        None, "training", "evaluate a moving average of the weights too, with this decay, e.g. 0.9999", type=float, metavar="DECAY"
    )

    precision: str = _option(
        "fp32", "scale", "of products: fp32, or autocast to bf16 or (with a scaled loss) fp16", choices=("fp32", "bf16", "fp16")
    )
    compile: bool = _option(False, "scale", "train through torch.compile", type=bool)
    cuda_graphs: bool = _option(
        False, "scale", "with --compile on CUDA: kernels are launched as recorded graphs, for steps that wait for Python", type=bool
    )
    sync_batchnorm: bool = _option(False, "scale", "batch norms over the images of all ranks (GPUs only)", type=bool)

    checkpoint_minutes: float = _option(
        10.0, "run", "time between checkpoints within an epoch; one is written after every epoch anyway", type=float, metavar="M"
    )
    keep_checkpoints: int = _option(2, "run", "newest checkpoints to keep, beside the best one", type=int, metavar="N")

    seed: int = _option(0, "run", "of initial weights, data order, augmentation and scoring samples", type=int)
    device: str = _option("cpu", "run", "cpu, cuda or cuda:N")
    threads: int | None = _option(None, "run", "CPU threads (default: torch's choice)", type=int, metavar="N")
    timing_rounds: int = _option(
        15, "run", "measured steps per arm, dense and sparse in turns, after training; 0 skips them", type=int, metavar="N"
    )
    tensorboard: str = _option(
        "auto", "run", "events in RUN/tensorboard: where the package is installed (auto), always or never", choices=("auto", "on", "off")
    )
    log_every: int = _option(50, "run", "steps between two values of loss and learning rate in TensorBoard", type=int, metavar="N")
    log_seconds: float = _option(
        60.0, "run", "seconds between two lines of progress where there is no terminal; 0: only one an epoch", type=float, metavar="S"
    )

    def validate(self) -> TrainConfig:
        """Raise UserError for a value out of range; return self."""
        for name, ok, expected in (
            ("device", re.fullmatch(r"cpu|cuda(:\d+)?", self.device), "cpu, cuda or cuda:N"),
            ("sparsity", self.sparsity is None or 0 <= self.sparsity < 1, "0 <= sparsity < 1 (0.98 keeps 2 %)"),
            ("min_density", 0 <= self.min_density <= 1, "a share between 0 and 1"),
            ("max_density", self.max_density is None or 0 < self.max_density <= 1, "a share above 0, at most 1"),
            ("budget", self.budget != "time" or self.speedup is not None or self.masks, "with 'time', a --speedup too"),
            ("speedup", self.speedup is None or self.speedup > 1, "a factor above 1"),
            ("speedup", self.speedup is None or self.budget == "time", "none unless --budget time"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("beta2", 0 <= self.beta2 < 1, "0 <= beta2 < 1"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "a norm above 0"),
            ("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "0 < ema_decay < 1"),
            (
                "sync_batchnorm", not self.sync_batchnorm or not self.device.startswith("cpu"),
                "false on the CPU, for which torch has no synchronized batch norm",
            ),
            ("cuda_graphs", not self.cuda_graphs or self.device.startswith("cuda"), "false on the CPU (it needs --device cuda)"),
            ("cuda_graphs", not self.cuda_graphs or self.compile, "false without --compile, which records them"),
            # Gradients that a graph left are overwritten when it is replayed for the next micro-batch.
            ("cuda_graphs", not self.cuda_graphs or self.accumulate == 1, "false with --accumulate above 1"),
            ("samples_per_class", self.samples_per_class >= 1, "at least 1"),
            ("score_batch", self.score_batch >= 1, "at least 1"),
            ("timing_rounds", self.timing_rounds != 1, "0, or at least 2 for quartiles"),
            ("lr", 0 < self.lr < math.inf, "a finite rate above 0"),
            ("momentum", 0 <= self.momentum < 1, "0 <= momentum < 1"),
            ("nesterov", self.momentum > 0 or not self.nesterov or self.optimizer != "sgd", "false at momentum 0 (--no-nesterov)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 <= label_smoothing < 1"),
            ("warmup", 0 <= self.warmup < 1, "0 <= warmup < 1, a share of training"),
            ("milestones", all(0 < m < 1 for m in self.milestones), "shares of training between 0 and 1"),
            ("max_seconds", self.max_seconds is None or self.max_seconds > 0, "above 0 seconds"),
            ("checkpoint_minutes", self.checkpoint_minutes >= 0, "at least 0 minutes (0: after every step)"),
            ("keep_checkpoints", self.keep_checkpoints >= 1, "at least 1"),
            ("threads", self.threads is None or 1 <= self.threads <= _MAX_THREADS, f"1 to {_MAX_THREADS}"),
            ("seed", -(2**63) <= self.seed < 2**63, "an integer of at most 64 bits, -2**63 <= seed < 2**63"),
            ("timing_rounds", self.timing_rounds >= 0, "at least 0"),
            ("workers", 0 <= self.workers <= _MAX_WORKERS, f"0 to {_MAX_WORKERS}"),
            ("max_corrupt", self.max_corrupt >= 0, "at least 0"),
            ("random_erasing", 0 <= self.random_erasing <= 1, "a share between 0 and 1"),
            ("log_every", self.log_every >= 1, "at least 1 step"),
            ("log_seconds", self.log_seconds >= 0, "at least 0 seconds"),
            ("train_limit", self.train_limit is None or self.train_limit >= 1, "at least 1"),
            ("test_limit", self.test_limit is None or self.test_limit >= 1, "at least 1"),
            ("image_size", self.image_size is None or 1 <= self.image_size <= _MAX_SIDE, f"1 to {_MAX_SIDE}"),
        ):
            if not ok:
                raise UserError(f"Expected {name}: {expected}, got {getattr(self, name)!r}")
        wants_tensorboard(self.tensorboard)
        try:
            sparsity_under(get_pattern(self.pattern), self.sparsity)
        except ValueError as error:
            raise UserError(str(error)) from None
        return self

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> TrainConfig:
        """Build from plain values; `source` names them in errors (unknown key, wrong type)."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key, value in values.items():
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}?" if near else f"valid keys: {', '.join(fields)}"
                raise UserError(f"unknown key '{key}' in {source}; {hint}")
        return cls(**{key: _typed(fields[key], value, source) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint and result.json store them."""
        return dataclasses.asdict(self)


def _typed(f: dataclasses.Field, value: Any, source: str) -> Any:
    """`value` as field `f` holds it; UserError, which names `source`, for one of another type or no choice of the field."""
    parse = f.metadata["type"]
    wanted = list if "nargs" in f.metadata else parse
    where = f"{f.name} in {source}"
    if value is None and f.default is None:
        return None
    value = _cast(wanted, value, where)
    if wanted is list:
        element = str if parse is list else parse
        value = [_cast(element, item, f"every element of {where}") for item in value]
    if (choices := f.metadata.get("choices")) and value not in choices:
        raise UserError(f"Expected {where} to be one of {', '.join(choices)}, got {value!r}")
    return value


def _cast(wanted: type, value: Any, where: str) -> Any:
    """`value`, an int as a float where one is wanted; UserError for any other type than `wanted`."""
    if wanted is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is not wanted:
        raise UserError(f"Expected {where} to be {wanted.__name__}, got {value!r}")
    return value


def packaged_recipes() -> dict[str, Any]:
    """Name -> file of the recipes that come with the package."""
    folder = resources.files("grasp_sparse.train") / "recipes"
    return {entry.name.removesuffix(".toml"): entry for entry in folder.iterdir() if entry.name.endswith(".toml")}


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Values of a packaged recipe (`demo`) or of a TOML file; `name` defaults to the recipe's own."""
    packaged = packaged_recipes()
    path = Path(name_or_path)
    if name_or_path in packaged:
        text = packaged[name_or_path].read_text(encoding="utf-8")
    elif path.is_file():
        text = _read_text(path)
    else:
        names = ", ".join(sorted(packaged))
        raise UserError(f"Expected --recipe to be a TOML file or one of: {names}; got {name_or_path!r}")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {name_or_path} is not valid TOML: {error}") from error
    return {"name": path.stem, **values}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"Expected recipe {path} to be a TOML file in UTF-8, got other bytes ({error})") from error
