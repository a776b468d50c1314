"""The sample subject: a toy whose body has a colour that no caption names, photographed for the course.

`python -m dbnb.toybox.sample` renders the pictures in `dbnb/sample/` again.
"""

from __future__ import annotations

from pathlib import Path

from dbnb.toybox import Toy, photograph

SAMPLE_DIR = Path(__file__).parents[1] / "sample"
SAMPLE_TOY = Toy(kind="dog", body=(0.10, 0.66, 0.62), accent=(0.98, 0.80, 0.12), pattern="spotted", head=1.05)
SIZE = 256
# Folder -> (scene, view seed) of each picture: five to learn from, six to compare with.
PICTURES = {
    "photos": (("desert", 1), ("grass", 2), ("city", 3), ("room", 4), ("snow", 5)),
    "references": (("beach", 11), ("city", 12), ("grass", 13), ("night", 14), ("room", 15), ("moon", 16)),
}


def write_sample(folder: Path = SAMPLE_DIR) -> list[Path]:
    """Render every sample picture; returns the files."""
    written = []
    for name, shots in PICTURES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, (scene, seed) in enumerate(shots, start=1):
            path = folder / name / f"{number:02d}.png"
            photograph(SAMPLE_TOY, scene=scene, seed=seed, size=SIZE, supersample=3).save(path, optimize=True)
            written.append(path)
    return written


if __name__ == "__main__":
    write_sample()
