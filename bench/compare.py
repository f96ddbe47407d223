"""What got slower between two runs of the microbenchmark, beyond the spread of either."""

from __future__ import annotations

from typing import Any


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return (*case["shape"], case["dtype"], case["threads"])


def slower(old: dict[str, Any], new: dict[str, Any], name: str = "ours", yardstick: str = "cross_entropy") -> list[str]:
    """A line for each case and phase where ``name``'s lower quartile now lies above its upper quartile then.

    Where ``yardstick``, whose code is the same in both runs, got slower too, the machine did: that much is forgiven.
    """
    before = {_key(case): case["contenders"] for case in old["results"]}
    found = []
    if old["machine"] != new["machine"]:
        found.append(f"these are two machines: {old['machine']} and {new['machine']}")
    for case in new["results"]:
        then, now = before.get(_key(case), {}), case["contenders"]
        if name not in then or name not in now:
            continue
        for phase in ("evaluation", "forward", "backward", "both"):
            drift = now[yardstick][phase][1] / then[yardstick][phase][1] if yardstick in then and yardstick in now else 1.0
            (_, was, high), (low, is_, _) = then[name][phase], now[name][phase]
            if low > high * max(1.0, drift):
                size = "x".join(map(str, case["shape"]))
                found.append(
                    f"slower: {size} {case['dtype']}, threads {case['threads']}, {phase}: {was * 1e6:.1f} -> {is_ * 1e6:.1f} us "
                    f"({is_ / was - 1:+.0%}; {yardstick} {drift - 1:+.0%})"
                )
    return found
