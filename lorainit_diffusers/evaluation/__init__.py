"""What a run is judged by: curves and sample grids (metrics and the comparison report build on the same files)."""

from lorainit_diffusers.evaluation.plots import plot_loss, sample_grid, smooth

__all__ = ["plot_loss", "sample_grid", "smooth"]
