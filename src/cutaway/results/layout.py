"""Places for the nodes of a layered drawing: few crossings, no overlaps, the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cutaway.core.errors import ResultError

SWEEPS = 12
SHIFTED = 0.8  # of the room beside it, at most, an edge is moved
BOW = 0.35  # of the way to the next row, an edge beside others is farthest from them
TURNED = 0.7  # of the way to the next row, an edge has turned into its gap


def ranks(count: int, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Longest path from a node without incoming edges, [node].

    Raises:
        ResultError: the edges form a circle, which has no layers.
    """
    height = np.zeros(count, dtype=np.int64)
    for _ in range(count):
        raised = height.copy()
        np.maximum.at(raised, target, height[source] + 1)
        if (raised == height).all():
            return height
        height = raised
    if len(source):
        raise ResultError("drawing a graph in layers", "its edges form a circle", "give the nodes' layer")
    return height


@dataclass(frozen=True, eq=False)
class Layout:
    """Centre ``x`` and ``row`` (0 below) of every node [node], their ``widths``, and the ``width`` of the whole."""

    x: np.ndarray
    row: np.ndarray
    widths: np.ndarray
    width: float
    gap: float

    def path(self, a: int, b: int, beside: float = 0.0) -> list[tuple[float, float]]:
        """Control points (x, row) of the edge from node ``a`` to node ``b``; it passes between the nodes on its way.

        ``beside`` moves it within the gap that it takes, so that edges through one gap can be told apart.
        """
        xa, xb, low, high = float(self.x[a]), float(self.x[b]), float(self.row[a]), float(self.row[b])
        if low == high:  # an arc above the row
            return [(xa, low), (xa, low + 0.5), (xb, low + 0.5), (xb, high)]
        step = 1 if high > low else -1
        between = (self.row > min(low, high)) & (self.row < max(low, high))
        channel = self._channel(xa, xb, between)
        if channel is None:
            # Straight up and beside others: a bow. Else one bend half-way.
            bends = (low + (high - low) * BOW, high - (high - low) * BOW) if xa == xb else ((low + high) / 2,) * 2
            return [(xa, low), (xa + beside, bends[0]), (xb + beside, bends[1]), (xb, high)]
        if channel not in (xa, xb):
            room = float((np.abs(self.x[between] - channel) - self.widths[between] / 2).min()) * SHIFTED
            channel += min(max(beside, -room), room)
        # Points close behind the turns and at every row keep the curve in its gap: with fewer it cuts corners.
        rows = [float(row) for row in range(round(low) + step, round(high), step)]
        near, soon = step / 2, step * TURNED
        along = [(channel, row) for row in (low + near, low + soon, *rows, high - soon, high - near)]
        return [(xa, low), (xa, low + step / 2), *along, (xb, high - step / 2), (xb, high)]

    def _channel(self, xa: float, xb: float, between: np.ndarray) -> float | None:
        """The x nearest to both ends where no node of the rows ``between`` stands; None when nothing is between."""
        if not between.any():
            return None
        left, right = (self.x + side * self.widths / 2 for side in (-1, 1))
        left, right = left[between], right[between]
        free = np.concatenate([[xa, xb], left - self.gap / 2, right + self.gap / 2])
        free = free[~((free[:, None] > left) & (free[:, None] < right)).any(axis=1)]
        return float(free[np.argmin(np.abs(free - xa) + np.abs(free - xb))])


def columned(height: np.ndarray, column: np.ndarray, pitch: float, width: float) -> Layout:
    """Places for nodes of the given heights (empty levels are dropped) in columns 0, 1, 2 ..., ``pitch`` apart."""
    row = np.unique(height, return_inverse=True)[1]
    x, widths = (column + 0.5) * pitch, np.full(len(height), width)
    return Layout(x, row, widths, pitch * (float(column.max(initial=0)) + 1), pitch - width)


def layered(height: np.ndarray, links: Sequence[tuple[int, int]], widths: np.ndarray, gap: float) -> Layout:
    """Places for nodes of the given heights (empty levels are dropped).

    Rows are ordered by the mean place of their neighbours, sweeping up and down.
    """
    levels, row = np.unique(height, return_inverse=True)
    rows = [np.flatnonzero(row == r) for r in range(len(levels))]
    neighbours: list[list[int]] = [[] for _ in range(len(height))]
    for a, b in links:
        neighbours[a].append(b)
        neighbours[b].append(a)
    total = max((float(widths[r].sum() + gap * (len(r) - 1)) for r in rows), default=1.0)
    x = np.zeros(len(height))
    for r in rows:
        x[r] = _spread(r, widths, gap, total)
    for sweep in range(SWEEPS):
        for r in rows if sweep % 2 == 0 else rows[::-1]:
            wish = np.array([np.mean([x[n] for n in neighbours[i]]) if neighbours[i] else x[i] for i in r])
            order = r[np.argsort(wish, kind="stable")]
            x[order] = _settle(np.sort(wish, kind="stable"), widths[order], gap, total)
    return Layout(x, row, widths, total, gap)


def _spread(nodes: np.ndarray, widths: np.ndarray, gap: float, total: float) -> np.ndarray:
    """Centres of nodes side by side, the row centred."""
    left = (total - (widths[nodes].sum() + gap * (len(nodes) - 1))) / 2
    starts = left + np.concatenate([[0.0], np.cumsum(widths[nodes] + gap)[:-1]])
    return np.asarray(starts + widths[nodes] / 2)


def _settle(wish: np.ndarray, widths: np.ndarray, gap: float, total: float) -> np.ndarray:
    """Centres in the given order, as near as they can be to where each wishes to be (least squares), without overlap
    and inside the drawing."""
    apart = np.concatenate([[0.0], np.cumsum((widths[1:] + widths[:-1]) / 2 + gap)])
    low, high = widths[0] / 2, total - widths[-1] / 2 - apart[-1]
    return np.asarray(np.clip(_rising(wish - apart), low, max(low, high)) + apart)


def _rising(values: np.ndarray) -> np.ndarray:
    """The nearest numbers that never fall: neighbours that would are replaced by their mean."""
    means: list[float] = []
    counts: list[int] = []
    for value in values:
        mean, count = float(value), 1
        while means and means[-1] > mean:
            more = counts.pop()
            mean = (mean * count + means.pop() * more) / (count + more)
            count += more
        means.append(mean)
        counts.append(count)
    return np.repeat(means, counts)
