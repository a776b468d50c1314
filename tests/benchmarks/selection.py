"""Does `--select best` choose a good step? `python tests/benchmarks/selection.py`.

Each toy is trained for three times the default number of steps, and measured on the way by the few pictures that a run
draws then. Afterwards every checkpoint is measured again, on more pictures from other noise. The table compares the
step that was chosen with the best one of that second measure, and with the last.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from results import record

from dbnb import metrics, toybox
from dbnb.adapters import strength
from dbnb.checkpoints import checkpoints, load_weights
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig
from dbnb.models import Components
from dbnb.pictures import load_image
from dbnb.selection import best_step, shares, trade_off
from dbnb.tables import Table
from dbnb.toybox.sample import write_toy
from dbnb.validation import SETS, validation_images
from dbnb.workflow import quiet_libraries, run

TOYS = (*((kind, 900 + number) for number, kind in enumerate(toybox.KINDS)), ("dog", 906), ("cat", 907))
_EVERY, _PICTURES = 75, 32


def measured_again(config: DreamBoothConfig, components: Components, concept: Concept) -> dict[int, float]:
    """Step -> trade-off of each checkpoint of a run, on pictures that the run has not drawn."""
    encoders = metrics.load_encoders(components.base)
    sampling, photographs = dataclasses.replace(config.sampling, seed=config.seed + 1), concept.images()
    further = [load_image(path, 256) for path in sorted(Path(config.reference_data_dir).iterdir())]
    top = metrics.ceiling(encoders, components, photographs, further, config.resolution)

    def numbers() -> dict[str, float]:
        images = validation_images(components, concept, sampling, count=_PICTURES, sets=SETS[:3])
        return metrics.evaluate(encoders, images, photographs, concept.class_prompt)

    with strength(components, 0.0):
        before = numbers()
    found = {}
    for folder in checkpoints(Path(config.output_dir)):
        step = load_weights(folder, components)
        found[step] = trade_off(shares(numbers(), before, top))
    return found


def main() -> None:
    """Train and measure all toys, and record the table."""
    quiet_libraries()
    rows = Table()
    for kind, seed in TOYS:
        with tempfile.TemporaryDirectory() as work:
            photographs = write_toy(toybox.random_toy(kind, seed), Path(work))
            config = DreamBoothConfig(
                instance_data_dir=str(photographs),
                reference_data_dir=str(Path(work) / "references"),
                class_word=kind,
                output_dir=str(Path(work) / "run"),
                max_train_steps=3 * DreamBoothConfig().max_train_steps,
                validation_steps=_EVERY,
                checkpointing_steps=_EVERY,
                checkpoints_total_limit=None,
                select="best",
            )
            result = run(config)
            concept = Concept.from_folder(photographs, config.identifier, kind, resolution=config.resolution)
            again = measured_again(config, result.components, concept)
            chosen, best, last = best_step(result.log), max(again, key=again.get), max(again)
            rows.append(
                {
                    "toy": f"{kind} {seed}",
                    "chosen step": f"{chosen}: {again[chosen]:.3f}",
                    "best step": f"{best}: {again[best]:.3f}",
                    "chosen / best": f"{again[chosen] / again[best]:.1%}",
                    "last step / best": f"{again[last] / again[best]:.1%}",
                }
            )
            print(rows[-1], flush=True)
    record("selection", rows, f"The trade-off of `dbnb.selection`, each on {_PICTURES} pictures a set.")


if __name__ == "__main__":
    main()
