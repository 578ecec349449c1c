"""What lies beside an image: its mask, which says what of it counts, and its conditioning image."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from lorainit_diffusers.training.data.images import ImageRecord, check_images, decoding, load_image
from lorainit_diffusers.training.data.notes import DataNotes, some


def load_mask(record: ImageRecord) -> Image.Image:
    """A mask as grey values: 255 counts in full, 0 not at all; what is transparent is white, as in every image.

    Raises:
        ValueError: When it cannot be decoded.
    """
    return load_image(record).convert("L")


def check_beside(records: Sequence[ImageRecord], sizes: Sequence[tuple[int, int]], notes: DataNotes) -> None:
    """See that masks fit their images and that conditioning images can be decoded.

    Where some images have a mask, one without counts whole, and a warning names it.

    Args:
        records: Images of one part of the data.
        sizes: (height, width) of each image.
        notes: Gets the warning.

    Raises:
        ValueError: For a mask of another size than its image or without a bright place, for an image without a
            conditioning image where others have one, and for what cannot be decoded.
    """
    masked = [(record, record.mask, size) for record, size in zip(records, sizes, strict=True) if record.mask]
    if masked:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda each: _check_mask(*each), masked))
        without = [str(record.path) for record in records if record.mask is None]
        if without:
            notes.warn(
                f"{len(without):,d} of {len(records):,d} images have no mask and count whole, the others by their "
                f"masks: {some(without)}"
            )
    seen = [record.conditioning for record in records if record.conditioning is not None]
    if seen:
        without = [str(record.path) for record in records if record.conditioning is None]
        if without:
            raise ValueError(
                f"{len(without):,d} of {len(records):,d} images have no conditioning image, the others have one: "
                f"{some(without)}; name one for each, or leave these images out"
            )
        check_images(seen)


def _check_mask(record: ImageRecord, mask: ImageRecord, size: tuple[int, int]) -> None:
    with decoding(mask):
        grey = load_mask(mask)
        is_black = grey.getbbox() is None
    if (grey.height, grey.width) != size:
        raise ValueError(
            f"the mask {str(mask.path)!r} has {grey.width} x {grey.height} pixels, its image {str(record.path)!r} "
            f"{size[1]} x {size[0]}; save it in the size of the image"
        )
    if is_black:
        raise ValueError(
            f"the mask {str(mask.path)!r} is all black, so that nothing of {str(record.path)!r} counts; make white "
            "what counts, or leave the image out"
        )
