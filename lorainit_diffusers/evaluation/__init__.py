"""What a run is judged by: metrics, curves and sample grids."""

from lorainit_diffusers.evaluation.encoders import ImageEncoder, ImageTextEncoder, load_encoder, require_text_encoder
from lorainit_diffusers.evaluation.metrics import (
    METRICS,
    KidEstimate,
    MetricInfo,
    Score,
    diversity,
    drift,
    image_similarity,
    kid,
    paired_similarity,
    perceptual_distance,
    text_alignment,
)
from lorainit_diffusers.evaluation.plots import plot_loss, sample_grid, smooth
from lorainit_diffusers.evaluation.validation import fixed_noise_loss

__all__ = [
    "METRICS",
    "ImageEncoder",
    "ImageTextEncoder",
    "KidEstimate",
    "MetricInfo",
    "Score",
    "diversity",
    "drift",
    "fixed_noise_loss",
    "image_similarity",
    "kid",
    "load_encoder",
    "paired_similarity",
    "perceptual_distance",
    "plot_loss",
    "require_text_encoder",
    "sample_grid",
    "smooth",
    "text_alignment",
]
