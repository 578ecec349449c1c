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
