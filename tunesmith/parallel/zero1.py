"""ZeRO stage 1: moments and master weights are split over processes, gradients and weights are whole on each.

After the last micro-batch gradients are reduced and scattered, each process updates its part, and the parts are
gathered: psi + psi sent, as much as an all-reduce (Rajbhandari et al. 2020, arXiv 1910.02054, sections 5.1 and 7.1).
"""

from __future__ import annotations

from collections.abc import Collection

from tunesmith.parallel.ddp import Split


class Zero1(Split):
    """Optimizer state in parts."""

    def reduce(self, names: Collection[str]) -> set[str]:
        missing = self._missing(names)
        for bucket in self.acting(names):
            self.give(bucket, self.scattered(self.gathered(bucket), bucket), names)
        return missing
