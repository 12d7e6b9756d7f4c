"""Gradients that vanish in fp16, with and without loss scaling, and in bf16: python benchmarks/underflow.py [FILE.svg]

One batch, every weight of the model, the loss multiplied by each factor: the share of gradients that fp32 has and fp16
makes zero, the share that overflowed, and how far the others are off. Prints a table; with a path, draws it, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import make_steps

WAYS = (("fp16", 0), ("fp16", 4), ("fp16", 8), ("fp16", 16), ("bf16", 0))  # factors as powers of two


def main() -> None:
    """Measures every format and factor and prints a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("svg", nargs="?", help="where to draw it")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=2)
    options = parser.parse_args()
    exact = gradients(options, "fp32", 1.0)
    there = {name: value != 0 for name, value in exact.items()}
    count = sum(int(mask.sum()) for mask in there.values())
    lost = []
    print("scale        vanished  not finite  error")
    for compute, power in WAYS:
        found = gradients(options, compute, 2.0**power)
        zero = sum(int((found[name][mask] == 0).sum()) for name, mask in there.items()) / count
        bad = sum(int((~value.isfinite()).sum()) for value in found.values()) / count
        apart = sum(float((found[name] - value).double().square().sum()) for name, value in exact.items())
        whole = sum(float(value.double().square().sum()) for value in exact.values())
        told = f"{100 * zero:8.3f} % {100 * bad:8.3f} % {(apart / whole) ** 0.5:8.4f}"
        print(f"{compute} 2^{power:<4} {told}", flush=True)
        lost.append(zero)
    if options.svg:
        Path(options.svg).write_text(drawn(lost), "utf-8")


def gradients(options: argparse.Namespace, compute: Any, factor: float) -> dict[str, Any]:
    """The gradient of the mean loss of one batch, float32, after the factor was taken out."""
    import tunesmith as ts
    from benchmarks.first_steps import batch_of
    from tunesmith.models.load import load
    from tunesmith.models.policy import Policy
    from tunesmith.objectives.sft import SFT
    from tunesmith.train.precision import Precision
    from tunesmith.train.section import PrecisionSection

    loaded = load(options.model, dtype=compute)
    settings = {"data": "alpaca-demo", "max_length": 512, "lengths": "mixed", "prefix": 0, "seed": 0}
    batch = batch_of(make_steps(settings | {"rows": options.rows, "steps": 1}, loaded.folder)[0])
    adapter = ts.Full().attach(loaded, "a", 0)
    policy = Policy(loaded, adapter.route).train()
    precision = Precision(adapter.parameters, PrecisionSection(compute="fp32" if compute == "fp32" else "bf16"))
    precision.backward(SFT().loss(policy, batch).total / SFT().weight(batch) * factor)
    return {name: master.grad / factor for name, master in precision.masters.items() if master.grad is not None}


def drawn(shares: list[float]) -> str:
    """Bars of what vanished, by factor."""
    width, height, top = 460, 200, max(shares) or 1
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">']
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    parts.append('<text x="10" y="20" font-size="13">Gradients that are 0 and not in fp32, by loss scale</text>')
    for place, ((compute, power), share) in enumerate(zip(WAYS, shares, strict=True)):
        x, tall = 30 + 70 * place, 115 * share / top
        parts.append(f'<rect x="{x}" y="{165 - tall:.1f}" width="44" height="{tall:.1f}" fill="#4477aa"/>')
        parts.append(f'<text x="{x + 22}" y="{158 - tall:.1f}" font-size="11" text-anchor="middle">{share:.2%}</text>')
        parts.append(f'<text x="{x + 22}" y="185" font-size="12" text-anchor="middle">{compute} 2^{power}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
