"""How a weight becomes integers: to the nearest, or with each row's error made up for by the rows that follow.

Rounding to the nearest makes the error of each weight as small as it can be; what counts is the error of the product.
Where texts were seen, the rows of a weight [K, N] are rounded one after the other, and those still to come are moved
so that the product of the seen activations X [tokens, K] stays as near as it can: with H = X^T X and U^T U = H^-1,
row i's error e_i = (w_i - q_i) / U_ii is taken from each later row j as U_ij e_i. This is GPTQ (Frantar et al. 2022,
https://arxiv.org/abs/2210.17323), rows in the order of their activations' size, and one step size for a whole column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

DAMPING = 0.01  # of the mean of H's diagonal, added to it: fewer tokens than channels leave H singular
ROWS = 64  # whose errors reach the rows after them together, in one product


@dataclass(frozen=True)
class Factor:
    """`upper` [K, K] is U for the rows in the order `order` [K]."""

    order: npt.NDArray[np.intp]
    upper: Doubles


def make_factor(activations: Floats) -> Factor:
    """Return the factor for the activations [tokens, K] that a weight is multiplied with."""
    moments = (activations.T @ activations).astype(np.float64)
    diagonal = np.diagonal(moments)
    order = np.argsort(-diagonal, kind="stable")
    # With rows and columns in reverse, H = L L^T; then U is L^-1, reversed again. K x K doubles are many: in place.
    moments = moments[np.ix_(order[::-1], order[::-1])]
    moments[np.diag_indices_from(moments)] += DAMPING * diagonal.mean() or 1.0  # 1 where all were 0
    lower = torch.from_numpy(moments)
    torch.linalg.cholesky(lower, out=lower)
    inverse = torch.eye(len(lower), dtype=lower.dtype)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower, moments
    return Factor(order, inverse.flip(0, 1).numpy())


def column_step_sizes(weight: Floats) -> Floats:
    """Return the step size of each column of a weight [K, N], float32 [N]: 1/127 of its largest value."""
    return np.maximum(np.abs(weight).max(axis=0) / 127, np.finfo(np.float32).tiny).astype(np.float32)


def round_weight(weight: Floats, step_sizes: Floats, factor: Factor | None) -> npt.NDArray[np.int8]:
    """Return the weight [K, N] in `step_sizes` [N], int8 [K, N], each in -127..127; without a factor, the nearest."""
    if factor is None:
        return np.rint(weight / step_sizes).astype(np.int8)
    rows = weight[factor.order] / step_sizes.astype(np.float64)
    rounded = np.empty(rows.shape, dtype=np.int8)
    upper = factor.upper
    for start in range(0, len(rows), ROWS):
        end = min(start + ROWS, len(rows))
        errors = np.empty((end - start, rows.shape[1]))
        for row in range(start, end):
            nearest = np.clip(np.rint(rows[row]), -127, 127)
            errors[row - start] = (rows[row] - nearest) / upper[row, row]
            rows[row + 1 : end] -= np.outer(upper[row, row + 1 : end], errors[row - start])
            rounded[factor.order[row]] = nearest
        rows[end:] -= upper[start:end, end:].T @ errors
    return rounded
