"""Which non-negative coefficients explain what was measured lately?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

_FORGETTING = 0.96
"""What a sample still counts after the next one: the last 25 count for most."""
_DAMPING = 0.01
"""What the latest coefficients count beside the samples: where these say nothing, the coefficients stay."""
_CLIP_SPREADS = 3.0
_MIN_CLIP = 0.3
_LEARNT_SPREAD = 0.5
"""Below it, predictions are near enough to tell what a sample should count."""
_MAX_CLIPPED_RUN = 5
"""So many samples in a row off to one side are a change, not outliers."""
_TINY_S = 1e-6

_Matrix = list[list[float]]


class OnlineRegression:
    """Recursive least squares with forgetting for `seconds = coefficients . features`; errors count relatively.

    Coefficients are never negative, and each direction in which features do not vary keeps what was known of it. A
    sample that is far off counts as one at the edge of what is usual; several in a row on the same side count in full,
    and the samples before them not any more. A sample takes some 10 us.
    """

    def __init__(self, coefficients: Sequence[float]) -> None:
        """Begin with a guess, which may be wrong by any factor."""
        self.coefficients = list(coefficients)
        self.num_samples = 0
        size = len(coefficients)
        self._squares: _Matrix = [[0.0] * size for _ in range(size)]
        self._products = [0.0] * size
        self._spread = 1.0
        """Mean relative error of late."""
        self._clipped: list[tuple[list[float], float]] = []
        self._side = 0

    def predict(self, features: Sequence[float]) -> float:
        return sum(c * x for c, x in zip(self.coefficients, features, strict=True))

    def add(self, features: Sequence[float], seconds: float) -> None:
        """Learn from one measurement."""
        self.num_samples += 1
        predicted = max(self.predict(features), _TINY_S)
        error = seconds / predicted - 1.0
        limit = max(_MIN_CLIP, _CLIP_SPREADS * self._spread)
        clipped = min(max(error, -limit), limit)
        self._spread += (1 - _FORGETTING) * (abs(clipped) - self._spread)
        if self._note(features, seconds, clipped != error, error > 0):
            self._restart()
        else:
            # By the prediction alone, or slow samples would count for less than fast ones and the mean come out too
            # short; but a guess that is far too short must not make its errors the ones that count.
            scale = predicted if self._spread < _LEARNT_SPREAD else max(predicted, seconds)
            self._accumulate(features, predicted * (1.0 + clipped), scale)
        self.coefficients = self._solve()

    def _note(self, features: Sequence[float], seconds: float, is_clipped: bool, is_over: bool) -> bool:
        """Follow the run of clipped samples; returns whether it is long enough to be a change."""
        side = (1 if is_over else -1) if is_clipped else 0
        if side != self._side:
            self._clipped.clear()
        self._side = side
        if side:
            self._clipped.append((list(features), seconds))
        return len(self._clipped) >= _MAX_CLIPPED_RUN

    def _restart(self) -> None:
        """Count the run in full, and nothing of what was before but the coefficients."""
        size = len(self._products)
        self._squares = [[0.0] * size for _ in range(size)]
        self._products = [0.0] * size
        for features, seconds in self._clipped:
            self._accumulate(features, seconds, max(seconds, _TINY_S))
        self._clipped.clear()
        self._spread = 1.0

    def _accumulate(self, features: Sequence[float], seconds: float, scale: float) -> None:
        weight = 1.0 / (scale * scale)
        for row, x in enumerate(features):
            squares = self._squares[row]
            for column, y in enumerate(features):
                squares[column] = _FORGETTING * squares[column] + weight * x * y
            self._products[row] = _FORGETTING * self._products[row] + weight * x * seconds

    def _solve(self) -> list[float]:
        """The best coefficients that are not negative: of the best for each choice of those that are zero.

        With three coefficients these are eight small systems, and the first one mostly does.
        """
        size = len(self._products)
        squares = [list(row) for row in self._squares]
        products = list(self._products)
        for i in range(size):
            damping = _DAMPING * squares[i][i] or 1.0
            squares[i][i] += damping
            products[i] += damping * self.coefficients[i]
        best, least = [0.0] * size, 0.0
        for used in product((True, False), repeat=size):
            indices = [i for i in range(size) if used[i]]
            values = _solved([[squares[i][j] for j in indices] for i in indices], [products[i] for i in indices])
            if min(values, default=0.0) < 0:
                continue
            # At the optimum of a choice the loss is this much below that of all zeros.
            loss = -sum(v * products[i] for v, i in zip(values, indices, strict=True))
            if loss < least:
                least = loss
                best = [0.0] * size
                for i, value in zip(indices, values, strict=True):
                    best[i] = value
            if len(indices) == size:
                break
        return best


def _solved(matrix: _Matrix, right: list[float]) -> list[float]:
    """Gauss's elimination; the matrix is symmetric and positive definite, so no pivots are looked for."""
    size = len(right)
    for i in range(size):
        for row in range(i + 1, size):
            factor = matrix[row][i] / matrix[i][i]
            for column in range(i, size):
                matrix[row][column] -= factor * matrix[i][column]
            right[row] -= factor * right[i]
    for i in reversed(range(size)):
        right[i] = (right[i] - sum(matrix[i][j] * right[j] for j in range(i + 1, size))) / matrix[i][i]
    return right
