"""Writes the README's pictures from a finished demo: sample grids side by side, and distance against evaluations."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
REPORT, PICTURES = ROOT / "artifacts" / "report", ROOT / "docs" / "pictures"
PANELS = {
    "real, held out": REPORT / "real" / "test.png",
    "teacher, 79 evaluations": REPORT / "grids" / "teacher-heun-79.png",
    "student, 10 evaluations": REPORT / "grids" / "student-10.png",
    "student, 4 evaluations": REPORT / "grids" / "student-4.png",
    "teacher, 4 evaluations (Euler)": REPORT / "grids" / "teacher-euler-4.png",
}
FACTOR, MARGIN, TITLE = 2, 16, 40


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    panels = {title: Image.open(path).convert("LA") for title, path in PANELS.items()}
    width, height = (FACTOR * side for side in next(iter(panels.values())).size)
    picture = Image.new("RGB", (len(panels) * (width + MARGIN) + MARGIN, height + TITLE + MARGIN), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=20)
    for column, (title, panel) in enumerate(panels.items()):
        left = MARGIN + column * (width + MARGIN)
        draw.text((left + width / 2, TITLE / 2), title, fill="#222222", font=font, anchor="mm")
        enlarged = panel.resize((width, height), Image.Resampling.NEAREST).convert("RGBA")
        picture.paste(enlarged, (left, TITLE), enlarged)
    picture.quantize(64).save(PICTURES / "demo.png", optimize=True)
    shutil.copyfile(REPORT / "charts" / "distance-efficientnet_lite0.svg", PICTURES / "distance.svg")


if __name__ == "__main__":
    main()
