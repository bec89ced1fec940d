"""Which frame of one recording goes with which of another."""

import numpy as np


# Cells of the table of moves, a byte each: recordings up to 80 s go through whole, and longer ones in a band around the
# diagonal, ten minutes with five seconds to either side
_MAX_CELLS = 1 << 26
_DIAGONAL, _UP, _LEFT = 0, 1, 2


def time_warp(first: np.ndarray, second: np.ndarray, max_cells: int = _MAX_CELLS) -> np.ndarray:
    """Dynamic time warping: the path with the least sum of Euclidean distances from both beginnings to both ends.

    A step goes one frame on in one of the two or in both, each at the cost of the cell it leads to (the symmetric rule
    without weights, as in the usual MCD-DTW).

    Args:
        first, second (`np.ndarray` of shape `(frames, size)`): At least a frame each.
        max_cells (`int`): Most cells that are looked at; beyond, a band around the diagonal.

    Returns:
        `np.ndarray`: `(steps, 2)`, the indices of the frames that go together, in time.

    Raises:
        ValueError: There are no frames, or the sizes differ.
    """
    first, second = (np.asarray(frames, dtype=np.float64) for frames in (first, second))
    if first.ndim != 2 or second.ndim != 2 or not len(first) or not len(second) or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"Time warping needs two arrays (frames, size) of the same size, got {first.shape} and {second.shape}."
        )
    num_rows, num_columns = len(first), len(second)
    slope = num_columns / num_rows
    # Wide enough for neighbouring rows to overlap, however unequal the lengths
    radius = max(int(max_cells / num_rows / 2), int(np.ceil(slope)) + 1)
    centres = np.arange(num_rows) * slope
    starts = np.clip(np.floor(centres - radius), 0, num_columns - 1).astype(int)
    stops = np.clip(np.ceil(centres + slope + radius), 1, num_columns).astype(int)

    moves, above, above_start = [], None, 0
    for row in range(num_rows):
        start, stop = starts[row], stops[row]
        costs = np.linalg.norm(second[start:stop] - first[row], axis=1)
        if above is None:
            entry = np.full(stop - start, np.inf)
            entry[0] = 0.0
            direction = np.full(stop - start, _DIAGONAL, dtype=np.int8)
        else:
            # Sums of the row above, directly and one column before, as far as the band reached there
            place = np.arange(start, stop) - above_start
            up = np.where((place >= 0) & (place < len(above)), above[np.clip(place, 0, len(above) - 1)], np.inf)
            place = place - 1
            diagonal = np.where((place >= 0) & (place < len(above)), above[np.clip(place, 0, len(above) - 1)], np.inf)
            entry = np.minimum(diagonal, up)
            direction = np.where(diagonal <= up, _DIAGONAL, _UP).astype(np.int8)
        # sum[j] = cost[j] + min(entry[j], sum[j - 1]): with running sums of the costs, a running minimum
        sums = np.cumsum(costs)
        entered = entry - (sums - costs)
        least = np.minimum.accumulate(entered)
        direction[1:][entered[1:] > least[:-1]] = _LEFT
        moves.append(direction)
        above, above_start = sums + least, start

    row, column = num_rows - 1, num_columns - 1
    path = [(row, column)]
    while row or column:
        move = moves[row][column - starts[row]]
        row, column = row - (move != _LEFT), column - (move != _UP)
        path.append((row, column))
    return np.array(path[::-1])


__all__ = ["time_warp"]
