"""Writes the documentation's pictures from a finished report: grids side by side, distance against evaluations.

python scripts/pictures.py demo             # the README's, after `make demo`
python scripts/pictures.py textures_ddpm    # docs/ddpm.md's, after that experiment
python scripts/pictures.py emoji            # docs/emoji.md's, after its commands
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
REAL = ("real, held out", "real/test.png")
PANELS = {  # title of each panel and its file in the report
    "demo": [
        REAL,
        ("teacher, 79 evaluations", "grids/teacher-heun-79.png"),
        ("student, 10 evaluations", "grids/student-10.png"),
        ("student, 4 evaluations", "grids/student-4.png"),
        ("teacher, 4 evaluations (Euler)", "grids/teacher-euler-4.png"),
    ],
    "textures_ddpm": [
        REAL,
        ("DDPM, 1,000", "grids/plain-ddpm-1000.png"),
        ("DDIM, 50", "grids/plain-ddim-50.png"),
        ("DDIM, 10", "grids/plain-ddim-10.png"),
        ("1 - t/1000, 10", "grids/plain-linear-alpha-10.png"),
        ("student, 10", "grids/student-plain-10.png"),
    ],
    "emoji": [
        REAL,
        ("teacher, 79 evaluations", "grids/teacher-heun-79.png"),
        ("teacher, 4 evaluations (2M)", "grids/teacher-2m-4.png"),
        ("student, 10 evaluations", "grids/student-10.png"),
        ("student, 4 evaluations", "grids/student-4.png"),
    ],
}
# panels a row, and how often each is enlarged
LAYOUT = {"demo": (5, 2), "textures_ddpm": (3, 3), "emoji": (3, 1)}
MARGIN, TITLE = 16, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=PANELS)
    parser.add_argument("--report", type=Path, default=ROOT / "artifacts" / "report", metavar="DIR")
    options = parser.parse_args()
    PICTURES.mkdir(parents=True, exist_ok=True)
    panels = {title: Image.open(options.report / name).convert("RGBA") for title, name in PANELS[options.experiment]}
    name = options.experiment
    arranged(panels, *LAYOUT[name]).quantize(256).save(PICTURES / f"{name}.png", optimize=True)
    if name == "demo":
        shutil.copyfile(options.report / "charts" / "distance-efficientnet_lite0.svg", PICTURES / "distance.svg")


def arranged(panels: dict[str, Image.Image], columns: int, factor: int) -> Image.Image:
    """Panels of one size in rows, enlarged, each below its title."""
    width, height = (factor * side for side in next(iter(panels.values())).size)
    rows = -(-len(panels) // columns)
    size = (columns * (width + MARGIN) + MARGIN, rows * (height + TITLE) + MARGIN)
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=20)
    for place, (title, panel) in enumerate(panels.items()):
        left, top = MARGIN + place % columns * (width + MARGIN), place // columns * (height + TITLE)
        draw.text((left + width / 2, top + TITLE / 2), title, fill="#222222", font=font, anchor="mm")
        enlarged = panel.resize((width, height), Image.Resampling.NEAREST).convert("RGBA")
        picture.paste(enlarged, (left, top + TITLE), enlarged)
    return picture


if __name__ == "__main__":
    main()
