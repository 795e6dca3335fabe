"""Which cells of a coarse grid an object covers, from a mask, from a box, or by convention."""

from __future__ import annotations

import numpy as np


def mask_cells(masks: np.ndarray, grid: int, *, share: float = 0.5) -> np.ndarray:
    """Cells that lie on the object by at least a share of their pixels.

    A pixel belongs to the cell that nearest-neighbour upsampling of the grid gives it.

    Args:
        masks: (N, H, W), nonzero on the object.
        grid: rows and columns of the grid.
        share: above 0, at most 1.

    Returns:
        bool (N, grid, grid).
    """
    if masks.ndim != 3 or not 1 <= grid <= min(masks.shape[1:]):
        raise ValueError(
            f"masks, grid: expected (N, H, W) and 1 to H and W cells, got {masks.shape} and {grid}"
        )
    if not 0 < share <= 1:
        raise ValueError(f"share: expected above 0 and at most 1, got {share}")
    rows, columns = (np.eye(grid)[np.arange(pixels) * grid // pixels] for pixels in masks.shape[1:])
    covered = rows.T @ (masks != 0) @ columns
    return np.asarray(covered >= share * np.outer(rows.sum(0), columns.sum(0)))


def box_masks(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Masks of the pixels whose centres lie in a box.

    Args:
        boxes: (N, 4), xmin ymin xmax ymax in pixels, maxima exclusive.
        height: of the images in pixels.
        width: likewise.

    Returns:
        bool (N, height, width).
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes: expected (N, 4), got {boxes.shape}")
    left, top, right, bottom = (boxes[:, k, None] for k in range(4))
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    inside_x, inside_y = (left <= x) & (x < right), (top <= y) & (y < bottom)
    return inside_y[:, :, None] & inside_x[:, None, :]


def central_cells(grid: int = 16) -> np.ndarray:
    """The central three quarters of rows and columns, bool (grid, grid): the authors' object without annotation."""
    if grid < 8 or grid % 8:
        raise ValueError(f"grid: expected a multiple of 8, got {grid}")
    inside = np.zeros((grid, grid), dtype=bool)
    inside[grid // 8 : -grid // 8, grid // 8 : -grid // 8] = True
    return inside
