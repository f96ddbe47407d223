"""Attacks: within eps and [0, 1], never to the defender's gain, and not stopped by a gradient that rounded to zero."""

import sys

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

import bench_path  # noqa: F401

import attack  # isort: skip
import data  # isort: skip
import train  # isort: skip

EPS = 0.1
EFFORT = attack.Effort(apgd_steps=5, queries=20)


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return train.train(train.Recipe(epochs=6), progress=False).net.requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    digits = data.load("digits")
    return digits.x_test[:48], digits.y_test[:48]


def right(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return attack.predict(net, x).argmax(1) == y


@pytest.mark.parametrize("name", attack.ATTACKS)
def test_within_eps_and_never_for_the_defence(name: str, net: torch.nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    if name not in ("fgsm", "pgd", "margin-pgd"):
        pytest.importorskip("pyautoattack")
    x, y = images
    eps = EPS
    if name == "autoattack":
        x, y, eps = x[:8], y[:8], 0.5  # at its published strength only: let it win early
    clean = right(net, x, y)
    x, y, clean = x[clean], y[clean], clean[clean]  # the library attacks what is right; so does survivors()
    x_adv = attack.ATTACKS[name](net, x, y, eps, EFFORT)
    assert x_adv.shape == x.shape and not x_adv.requires_grad
    assert (x_adv - x).abs().max() <= eps + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    kept = attack.survivors(net, x, y, attack.ATTACKS[name], eps, EFFORT, clean)
    assert torch.equal(kept, clean & right(net, attack.project(x_adv, x, eps), y))
    assert kept.float().mean() < 0.9  # it does attack


def test_strong_is_the_worst_case(net: torch.nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    pytest.importorskip("pyautoattack")
    kept = attack.evaluate(net, *images, EPS, ("clean", "fgsm", "pgd", "strong"), EFFORT)
    for name in ("clean", "pgd", *(f"strong/{part}" for part in attack.STRONG)):
        assert not (kept["strong"] & ~kept[name]).any(), name
    assert kept["strong"].sum() < kept["clean"].sum()
    assert not (kept["fgsm"] & ~kept["clean"]).any()


def test_larger_radius_leaves_fewer(net: torch.nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    left = [attack.evaluate(net, *images, eps, ("pgd",))["pgd"].sum() for eps in (0.0, 0.05, 0.1, 0.3)]
    assert left[0] == right(net, *images).sum()
    assert left[0] > left[1] > left[2] > left[3]


def test_cheating_attack_is_projected(net: torch.nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    seen = []

    def cheat(net: torch.nn.Module, x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(len(x))
        return torch.zeros_like(x) - 5

    x, y = images
    clean = right(net, x, y)
    kept = attack.survivors(net, x, y, cheat, EPS, EFFORT, clean)
    assert torch.equal(kept, clean & right(net, (x - EPS).clamp(0, 1), y))
    assert sum(seen) == clean.sum()  # what is wrong already is left alone


def test_attack_through_our_loss_does_not_stall(net: torch.nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    pytest.importorskip("pyautoattack")
    rows = {(row["factor"], row["objective"]): row for row in attack.stall(net, *images, EPS, (1, 30), EFFORT)}
    through = dict(zip(("torch", "ours32", "torch64", "ours"), attack.OBJECTIVES, strict=True))
    assert rows[30, through["torch"]]["median_margin"] > 60
    assert rows[30, through["torch"]]["zero_true_logit"] > 0.9 and rows[30, through["torch"]]["zero_loss"] > 0.9
    assert rows[30, through["torch64"]]["zero_input"] > 0.5
    assert rows[30, through["ours"]]["zero_input"] == 0
    # the same classifier, so the same accuracy under attack, give or take the step size's rounding
    assert abs(rows[30, through["ours"]]["pgd"] - rows[1, through["ours"]]["pgd"]) < 0.05
    assert rows[30, through["torch64"]]["pgd"] > rows[30, through["ours"]]["pgd"] + 0.05


def test_gradients_of_the_objective_are_exact() -> None:
    """Float32 logits, margins up to 80: fastsoftloss keeps the true logit's gradient where F.cross_entropy has 0."""
    for gap in (10.0, 25.0, 80.0):
        z = torch.zeros(1, 10)
        z[0, 3] = gap
        z.requires_grad_()
        target = torch.tensor([3])
        (ours,) = torch.autograd.grad(attack._ours_float32(z, target).sum(), z)
        assert ours[0, 3].item() == pytest.approx(-9 * 2.718281828459045**-gap, rel=1e-3)
        (log_ours,) = torch.autograd.grad(attack.cross_entropy(z, target).sum(), z)
        assert log_ours[0, 3].item() == pytest.approx(-1, rel=1e-3)
        (theirs,) = torch.autograd.grad(attack._torch_float32(z, target).sum(), z)
        assert (theirs[0, 3] == 0) == (gap > 20)


def test_library_leaves_our_generator_alone(net: torch.nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    pytest.importorskip("pyautoattack")
    x, y = (part[:4] for part in images)
    state = torch.random.get_rng_state()
    for name in ("apgd-ce", "apgd-t", "square"):
        attack.ATTACKS[name](net, x, y, EPS, EFFORT)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_is_missing_is_said_in_one_line(
    net: torch.nn.Module, images: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="attacks are clean, fgsm"):
        attack.evaluate(net, *images, EPS, ("nothing",))
    few_classes = torch.nn.Sequential(net, torch.nn.Linear(10, 3).requires_grad_(False))
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    for name in ("apgd-ce", "apgd-t", "square", "autoattack"):
        with pytest.raises(SystemExit, match=r"^[^\n]*pip install pyautoattack[^\n]*$"):
            attack.evaluate(net, *images, EPS, (name,))
    monkeypatch.undo()
    pytest.importorskip("pyautoattack")
    for name in ("apgd-t", "autoattack"):
        with pytest.raises(SystemExit, match=f"{name} needs at least 4 classes"):
            attack.ATTACKS[name](few_classes, *images, EPS)


def test_fewer_classes_than_the_library_aims_at_and_no_image_left(net: torch.nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    pytest.importorskip("pyautoattack")
    five = torch.nn.Sequential(net, torch.nn.Linear(10, 5, bias=False).requires_grad_(False))
    torch.nn.init.eye_(five[1].weight)
    x, y = images
    few = (y < 5).nonzero().squeeze(1)[:4]
    clean = right(five, x[few], y[few])
    kept = attack.evaluate(five, x[few], y[few], 0.5, ("autoattack", "strong"), EFFORT)
    assert not (kept["autoattack"] & ~clean).any() and clean.any()
    nothing = attack.survivors(net, x, y, attack.apgd_ce, EPS, EFFORT, torch.zeros(len(y), dtype=torch.bool))
    assert not nothing.any()
