"""Names of the first version, for programs that import them; what they name is in `lorainit_diffusers.training`."""

from lorainit_diffusers.training.data.folders import read_image_folder
from lorainit_diffusers.training.data.images import DatasetImage, ImageRecord, check_images, load_image
from lorainit_diffusers.training.data.text_to_image import read_data

__all__ = ["DatasetImage", "ImageRecord", "check_images", "load_image", "read_data", "read_image_folder"]
