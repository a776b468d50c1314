"""The sample subject: a toy whose body has a colour that no caption names, photographed for the course.

`python -m dbnb.toybox.sample` renders the pictures in `dbnb/sample/` again.
"""

from __future__ import annotations

from pathlib import Path

from dbnb.files import whole
from dbnb.toybox import Toy, photograph

SAMPLE_DIR = Path(__file__).parents[1] / "sample"
SAMPLE_TOY = Toy(kind="dog", body=(0.10, 0.66, 0.62), accent=(0.98, 0.80, 0.12), pattern="spotted", head=1.05)
SIZE = 256
# Folder -> (scene, view seed) of each picture: five to learn from, six to compare with.
PICTURES = {
    "photos": (("desert", 1), ("grass", 2), ("city", 3), ("room", 4), ("snow", 5)),
    "references": (("beach", 11), ("city", 12), ("grass", 13), ("night", 14), ("room", 15), ("moon", 16)),
}


def write_toy(toy: Toy, folder: Path) -> Path:
    """Photograph a toy as the sample subject is: five pictures in `photos`, six others in `references`.

    Returns the folder of the five, to train on. Raises ValueError, before anything is written, where other files are in
    one of the two: anyone who trains on it would train on them.
    """
    folder = Path(folder)
    for name, shots in PICTURES.items():
        own = {f"{number:02d}.png" for number in range(1, len(shots) + 1)}
        found = sorted(path.name for path in (folder / name).glob("*") if path.name not in own)
        if found:
            raise ValueError(f"{folder / name} holds other files, such as {found[0]}: give another folder.")
    for name, shots in PICTURES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, (scene, seed) in enumerate(shots, start=1):
            picture = photograph(toy, scene=scene, seed=seed, size=SIZE, supersample=3)
            with whole(folder / name / f"{number:02d}.png") as temporary:
                picture.save(temporary, optimize=True)
    return folder / "photos"


if __name__ == "__main__":
    write_toy(SAMPLE_TOY, SAMPLE_DIR)
