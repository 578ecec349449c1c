"""What a run is judged by: curves and sample grids (metrics and the comparison report build on the same files)."""

from lorainit_diffusers.evaluation.comparison import Comparison
from lorainit_diffusers.evaluation.encoders import ImageEncoder, ImageTextEncoder, load_encoder, require_text_encoder
from lorainit_diffusers.evaluation.html_report import result_sentences, write_report
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
    "Comparison",
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
    "result_sentences",
    "sample_grid",
    "smooth",
    "text_alignment",
    "write_report",
]
