"""Where the bundled bases and data lie: in the repository, not in the installed package."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The bundled base of a family, where it has one, and the data that scripts take when nothing is said.
BUNDLED_BASES = {
    "sd": str(ROOT / "assets" / "models" / "tiny-sd"),
    "sd3": str(ROOT / "assets" / "models" / "tiny-dit"),
    "classifier": str(ROOT / "assets" / "models" / "tiny-vit"),
    "vlm": str(ROOT / "assets" / "models" / "tiny-vlm"),
}
BUNDLED_DATA = ROOT / "assets" / "data" / "high-contrast"
BUNDLED_CLASSES = ROOT / "assets" / "data" / "high-contrast-classes"
BUNDLED_QUESTIONS = ROOT / "assets" / "data" / "high-contrast-questions"


def bundled(place: str | Path, flag: str) -> str:
    """A bundled base or data set, for whoever has given none of his own.

    Args:
        place: Where it lies.
        flag: That would name another one.

    Raises:
        ValueError: When it is not there; says where it is, and what to give instead.
    """
    if not Path(place).exists():
        raise ValueError(
            f"{flag} is missing, and the bundled {Path(place).name} is part of the repository of lorainit-diffusers, "
            f"not of the installed package (it would be at {str(place)!r}): give your own, or run in a checkout"
        )
    return str(place)
