"""Trellis search in NumPy: one Viterbi pass per head vector, all vectors of a batch at once.

Trellis-coded quantisation (Marcellin and Fischer, IEEE Trans. Comm. 38, 1990) with Ungerboeck's 64-state feed-forward code:
the levels are split into four subsets by index mod 4, a window of the last seven coded bits names the subset, and the other bits
name the level within it. The path starts in state 0. Equal to csrc/ref/codec.c to the bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

V = 6
STATES = 1 << V
TAPS1, TAPS0 = 0x61, 0x14  # bit k of the window is the coded bit u[t-k]

F32 = np.float32


def _parity(w: NDArray[np.int64]) -> NDArray[np.int64]:
    for s in (4, 2, 1):
        w = w ^ (w >> s)
    return w & 1


def subset_of(window: NDArray[np.int64]) -> NDArray[np.int64]:
    """Subset (0..3) named by windows of seven coded bits."""
    return 2 * _parity(window & TAPS1) + _parity(window & TAPS0)


_STATE = np.arange(STATES)
_SUBSET = np.stack([subset_of(_STATE), subset_of(_STATE | STATES)])  # [older bit, new state]
_PRED = np.stack([_STATE >> 1, (_STATE >> 1) | STATES // 2])


def nearest_in_subset(y: NDArray[np.float32], levels: NDArray[np.float32]) -> NDArray[np.int64]:
    """Index of the nearest level of each subset: y [...], levels [4 n] ascending -> [..., 4]."""
    by_subset = levels.reshape(-1, 4).T  # [4, n]
    mid = F32(0.5) * (by_subset[:, :-1] + by_subset[:, 1:])  # [4, n - 1]
    n = (y[..., None, None] > mid).sum(-1)
    return 4 * n + np.arange(4)


def viterbi(cost: NDArray[np.float32], best: NDArray[np.int64]) -> NDArray[np.int64]:
    """Best path for a batch: cost, best [n, d, 4] -> level indices [n, d].

    Ties keep the predecessor with the older bit 0 and the lowest final state.
    """
    n, d, _ = cost.shape
    metric = np.full((n, STATES), 1e30, F32)
    metric[:, 0] = 0
    decision = np.empty((n, d, STATES), np.uint8)
    for t in range(d):
        a = metric[:, _PRED[0]] + cost[:, t, _SUBSET[0]]
        b = metric[:, _PRED[1]] + cost[:, t, _SUBSET[1]]
        take_b = b < a
        decision[:, t] = take_b
        metric = np.where(take_b, b, a)
    state = metric.argmin(1)
    index = np.empty((n, d), np.int64)
    rows = np.arange(n)
    for t in range(d - 1, -1, -1):
        c = decision[rows, t, state].astype(np.int64)
        index[:, t] = best[rows, t, _SUBSET[c, state]]
        state = (state >> 1) | (c << (V - 1))
    return index


def coded_bits(index: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The coded bits u that lead through the subsets of a path: index [n, d] -> [n, d]."""
    window = np.zeros(index.shape[0], np.int64)
    u = np.empty(index.shape, np.uint8)
    for t in range(index.shape[1]):
        window = (window << 1) & (2 * STATES - 1)
        u[:, t] = subset_of(window) != (index[:, t] & 3)
        window |= u[:, t]
    return u


def subsets(u: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Subset of every coordinate from its coded bits, by shifted copies as the kernels do it: u [n, d] -> [n, d]."""
    n, d = u.shape
    past = np.concatenate([np.zeros((n, V), np.int64), u.astype(np.int64)], axis=1)
    z = np.zeros((2, n, d), np.int64)
    for k in range(V + 1):
        shifted = past[:, V - k : V - k + d]
        z[1] ^= shifted * (TAPS1 >> k & 1)
        z[0] ^= shifted * (TAPS0 >> k & 1)
    return 2 * z[1] + z[0]
