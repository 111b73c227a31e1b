"""Points of a Pareto front, and what one curve saves over another. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# ---- arithmetic --------------------------------------------------------------------------------------------

GRID = 5  # points at which two curves are compared
Point = tuple[float, float]  # (bytes, KLD)



def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other undercuts in both numbers: bytes rising, KLD falling."""
    best: list[Point] = []
    for size, kld in sorted(points):
        if not best or kld < best[-1][1]:
            best.append((size, kld))
    return best


def bytes_at_kld(curve: Iterable[Point], kld: float) -> float | None:
    """Bytes at which a curve has this KLD: linear in bytes, logarithmic in KLD, between the points of its front.

    None outside of them: nothing is extrapolated.
    """
    points = [(size, loss) for size, loss in front(curve) if loss > 0]
    if not points or not points[-1][1] <= kld <= points[0][1]:
        return None
    losses = [math.log(loss) for _, loss in reversed(points)]
    return float(np.interp(math.log(kld), losses, [size for size, _ in reversed(points)]))


def kld_at_bytes(curve: Iterable[Point], size: float) -> float | None:
    """The same curve the other way round."""
    points = [(at, loss) for at, loss in front(curve) if loss > 0]
    if not points or not points[0][0] <= size <= points[-1][0]:
        return None
    return math.exp(float(np.interp(size, [at for at, _ in points], [math.log(loss) for _, loss in points])))


@dataclass(frozen=True)
class Saving:
    """Share of a curve's bytes at equal KLD that a row does not read; negative: it reads more.

    bound: `>` or `<` where the row's KLD is below or above all of the curve: compared with the curve's end then.
    """

    share: float
    bound: str = ""

    @property
    def tells(self) -> bool:
        """Whether a bound says who is ahead: `>-5 %` and `<+5 %` do not."""
        return not self.bound or (self.share > 0) == (self.bound == ">")

    def __str__(self) -> str:
        return f"{self.bound}{100 * self.share:+.1f} %"


def saving(row: Point, curve: Iterable[Point]) -> Saving | None:
    """See Saving; None: there is no curve, or its end reads nothing."""
    points = [point for point in front(curve) if point[1] > 0]
    if not points:
        return None
    size, bound = bytes_at_kld(points, row[1]), ""
    if size is None:
        size, bound = (points[-1][0], ">") if row[1] < points[-1][1] else (points[0][0], "<")
    return Saving(1 - row[0] / size, bound) if size > 0 else None


def kld_ratio(ours: Sequence[Point], base: Sequence[Point]) -> float | None:
    """KLD of one curve relative to another's at equal bytes, the geometric mean over where both are; None: nowhere."""
    fronts = [[point for point in front(curve) if point[1] > 0] for curve in (ours, base)]
    if not all(fronts):
        return None
    low, high = max(f[0][0] for f in fronts), min(f[-1][0] for f in fronts)
    if low > high:
        return None
    logs = []
    for size in np.linspace(low, high, GRID).clip(low, high):
        pair = [kld_at_bytes(curve, float(size)) for curve in fronts]
        assert pair[0] and pair[1], "within both"
        logs.append(math.log(pair[0] / pair[1]))
    return math.exp(sum(logs) / len(logs))
