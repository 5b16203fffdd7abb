"""The assignment problem: who takes what, at the least cost in all."""

from __future__ import annotations

import numpy as np

from rayseek.cluster.eplb import Floats


def assign(cost: Floats) -> list[int]:
    """The cheapest one-to-one choice of a column for each row of a square matrix.

    Kuhn's method with potentials: rows enter one by one, each along a shortest path of changes.
    """
    n = len(cost)
    row_price, column_price = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.zeros(n + 1, np.int64)  # of each column; rows and columns count from 1, 0 is none
    for row in range(1, n + 1):
        row_of[0], column = row, 0
        best, came, done = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64), np.zeros(n + 1, bool)
        while row_of[column]:
            done[column] = True
            r = row_of[column]
            through = cost[r - 1] - row_price[r] - column_price[1:]
            better = ~done[1:] & (through < best[1:])
            best[1:][better], came[1:][better] = through[better], column
            column = int(np.where(done, np.inf, best)[1:].argmin()) + 1
            step = best[column]
            row_price[row_of[done]] += step
            column_price[done] -= step
            best[~done] -= step
        while column:
            row_of[column], column = row_of[came[column]], int(came[column])
    result = [0] * n
    for column in range(1, n + 1):
        result[row_of[column] - 1] = column - 1
    return result
