"""Fashion-MNIST: 60,000 + 10,000 grey images, 28x28, ten classes; found on disk or downloaded."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grasp_sparse.train.distributed import current_ranks
from grasp_sparse.train.errors import UserError

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD_FOLDER = Path("data")
_STEMS = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, gzipped or plain: uint8 tensor of the shape in its header.

    Header, big-endian: two zero bytes, type 0x08, number of dimensions, then each dimension as 4 bytes.
    (torchvision's reader does not take the gzipped files that Debian installs.)
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; get the file again") from error
    dims = raw[3] if len(raw) >= 4 and raw[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(raw, ">u4", count=dims, offset=4) if 0 < dims and len(raw) >= 4 + 4 * dims else []
    body = len(raw) - 4 - 4 * dims
    if len(shape) == 0 or body != int(np.prod(shape, dtype=np.int64)):
        raise UserError(f"Expected {path} to be a whole IDX file of bytes, got {len(raw)} bytes that are not; get it again")
    return torch.from_numpy(np.frombuffer(bytearray(raw), np.uint8, offset=4 + 4 * dims).reshape(shape.astype(int)))


def _files(folder: Path) -> dict[str, tuple[Path, Path]] | None:
    """Split -> (images file, labels file) when `folder`, or torchvision's layout below it, holds all four."""
    for candidate in (folder, folder / "FashionMNIST" / "raw"):
        found = {}
        for split, stem in _STEMS.items():
            names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
            paths = [next((p for p in (candidate / n, candidate / f"{n}.gz") if p.is_file()), None) for n in names]
            if None not in paths:
                found[split] = tuple(paths)
        if len(found) == 2:
            return found
    return None


def _download(folder: Path) -> dict[str, tuple[Path, Path]] | None:
    from torchvision.datasets import FashionMNIST  # slow import, rarely needed

    try:
        FashionMNIST(str(folder), train=True, download=True)
    except (RuntimeError, OSError):  # no network, or a folder that cannot be written
        return None
    return _files(folder)


def find_fashion_mnist(data_dir: str | None) -> tuple[dict[str, tuple[Path, Path]], Path]:
    """Files of both splits and the folder they were found in.

    Looks in `data_dir`, then where Debian's package puts them, then asks torchvision to download them (into `data_dir`
    or ./data), unless several ranks would do so at once. A `data_dir` that is given and does not exist is an error.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UserError(f"Expected --data-dir to be a folder, got {data_dir!r}, which does not exist; create it or leave it out")
    target = Path(data_dir) if data_dir is not None else DOWNLOAD_FOLDER
    for folder in (target, SYSTEM_FOLDER):
        if files := _files(folder):
            return files, folder
    # one process at a time may write there
    if current_ranks().size == 1 and (files := _download(target)):
        return files, target
    raise UserError(
        "Fashion-MNIST not found; do one of: put its four idx files in a folder and pass --data-dir DIR; "
        "apt-get install dataset-fashion-mnist (Debian, Ubuntu); or run once in one process with network so that torchvision can "
        "download it"
    )


def load_fashion_mnist(data_dir: str | None) -> tuple[dict[str, tuple[Tensor, Tensor]], Path]:
    """Split -> (images uint8 [N, 1, 28, 28], labels int64 [N]), and where they came from."""
    files, folder = find_fashion_mnist(data_dir)
    splits = {}
    for split, (images_path, labels_path) in files.items():
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise UserError(
                f"Expected images [N, 28, 28] and labels [N], got {tuple(images.shape)} in {images_path} "
                f"and {tuple(labels.shape)} in {labels_path}"
            )
        splits[split] = (images[:, None], labels.long())
    return splits, folder
