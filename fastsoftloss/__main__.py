"""``python -m fastsoftloss``: what is built, which backend serves which device, and does it agree with the definition."""

from __future__ import annotations

import sys

import torch

from fastsoftloss import __version__, backends, functional, ops


def self_check(backend: str, device: torch.device) -> float:
    """The largest error of loss and gradient against the float64 reference, relative to the row's largest element."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for rows, classes in ((33, 10), (5, 1000)):
        target = torch.randint(classes, (rows,), generator=generator)
        logits = 4 * torch.randn(rows, classes, generator=generator)
        for diversity in ops.DIVERSITIES:
            results = []
            for dtype, where, name in ((torch.float32, device, backend), (torch.float64, torch.device("cpu"), "reference")):
                z = logits.to(where, dtype).requires_grad_()
                loss = functional.cross_entropy(z, target.to(where), reduction="none", diversity=diversity, backend=name)
                (dz,) = torch.autograd.grad(loss.sum(), z)
                results.append((loss.detach().cpu().double(), dz.cpu().double()))
            (loss, dz), (true_loss, true_dz) = results
            scale = true_dz.abs().amax(1, keepdim=True)
            worst = max(worst, ((loss - true_loss) / true_loss).abs().max().item(), ((dz - true_dz) / scale).abs().max().item())
    return worst


def main() -> int:
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    print(f"fastsoftloss {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    failed = False
    for name in backends.NAMES:
        if name in backends.missing():
            print(f"  {name:<10} missing: {backends.missing()[name]}")
            continue
        served = [device for device in devices if backends.serves(name, device)]
        if not served:
            print(f"  {name:<10} ready, but there is no device here that it serves")
        for device in served:
            error = self_check(name, device)
            failed |= not error < 1e-5
            verdict = "agrees with" if error < 1e-5 else "DISAGREES WITH"
            notes = ("  (default)" if backends.default(device) == name else "") + backends.detail(name)
            print(f"  {name:<10} {device}: {verdict} the float64 reference, largest relative error {error:.1e}{notes}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
