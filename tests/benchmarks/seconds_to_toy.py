"""Seconds until it is the toy, ours beside diffusers' own script: `python seconds_to_toy.py train_dreambooth_lora.py`.

Both start from nothing: a process of its own, no class images. Both keep a checkpoint every few steps and draw nothing
else; afterwards each checkpoint is measured by the same pictures from the same noise. The number is how far subject
fidelity has come from that of the base (0) to that of other photographs of the toy (1).

Ours runs at its defaults. The peer knows adapters on attention alone; its learning rate is the one that reached the
goal first on another toy (`--search`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from against_peer import peer_arguments, run
from results import record

from dbnb import metrics, miniature, toybox
from dbnb.adapters import add_adapters
from dbnb.checkpoints import checkpoints, load_weights
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig
from dbnb.drawing import build_pipeline
from dbnb.export import load_adapter
from dbnb.models import Components, load_components
from dbnb.selection import shares
from dbnb.tables import Table
from dbnb.toybox.sample import write_toy
from dbnb.validation import validation_images
from dbnb.workflow import quiet_libraries, references

TOYS = tuple((toybox.KINDS[number % len(toybox.KINDS)], 900 + number) for number in range(8))
SEARCHED = (("dog", 501),)
PEER = {"learning_rate": 3e-3, "lr_scheduler": "constant"}  # the first of the candidates to reach the goal
CANDIDATES = [{"learning_rate": rate, "lr_scheduler": "constant"} for rate in (1e-3, 3e-3, 6e-3)]
GOAL, _PICTURES = 0.9, 16
_COLUMNS = {"peer": "diffusers' script"}
_EVERY, _PEER_EVERY, _PEER_STEPS = 25, 50, 400


def ours(config: DreamBoothConfig, work: Path) -> dict[float, float]:
    """Seconds -> normalised fidelity of our run at its defaults."""
    folder = work / "ours"
    words = ["--base", config.base, "--instance_data_dir", config.instance_data_dir, "--class_word", config.class_word]
    words += ["--output_dir", str(folder), "--num_validation_images", "0", "--checkpoints_total_limit", "-1"]
    if config.tokenizer_max_length is not None:
        words += ["--tokenizer_max_length", str(config.tokenizer_max_length)]
    notes, _ = run("dbnb", [*words, "--checkpointing_steps", str(_EVERY)], work / "cache")
    components = load_components(config.base)
    add_adapters(components, config.adapters)

    def states():
        for path in checkpoints(folder):
            yield load_weights(path, components), components

    return curve(config, notes, states())


def peers(peer: Path, config: DreamBoothConfig, settings: dict, work: Path, name: str = "peer") -> dict[float, float]:
    """Seconds -> normalised fidelity of the peer's run; a further run in the same folder finds the class images."""
    folder = work / name
    concept = Concept.from_folder(config.instance_data_dir, config.identifier, config.class_word)
    options = {
        "sample_batch_size": config.sample_batch_size,
        "train_batch_size": config.train_batch_size,
        "rank": config.rank,
        "checkpointing_steps": _PEER_EVERY,
    }
    words = peer_arguments(concept, config.instance_data_dir, work / "class", folder, _PEER_STEPS, options | settings)
    notes, _ = run(str(peer), [*words, "--pre_compute_text_embeddings"], work / "cache")

    def states():
        for path in sorted(folder.glob("checkpoint-*"), key=_step):
            components = load_components("miniature")
            load_adapter(build_pipeline(components), path / "pytorch_lora_weights.safetensors")
            yield _step(path), components

    return curve(config, notes, states())


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def curve(config: DreamBoothConfig, notes: dict, states) -> dict[float, float]:
    """Seconds since the process began -> normalised fidelity, for each (step, components) of `states`."""
    encoders, base = metrics.load_encoders(miniature.path()), load_components(config.base)
    concept = Concept.from_folder(config.instance_data_dir, config.identifier, config.class_word)
    photographs = concept.images()
    top = metrics.ceiling(encoders, base, photographs, references(config), config.resolution)

    def found(components: Components) -> dict[str, float]:
        images = validation_images(components, concept, config.sampling, count=_PICTURES, sets=("subject", "scenes"))
        return metrics.evaluate(encoders, images, photographs, concept.class_prompt)

    before = found(base)
    return {
        notes["steps"][step - 1] - notes["started"]: shares(found(components), before, top)["subject_gained"]
        for step, components in states
    }


def reached(points: dict[float, float]) -> str:
    """When the goal was reached, or how far it came."""
    first = next((seconds for seconds, value in points.items() if value >= GOAL), None)
    return f"never; at most {max(points.values()):.2f}" if first is None else f"{first:.0f} s"


def main() -> None:
    """Run both on all toys, or the peer's candidates on the toys of the search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", type=Path)
    parser.add_argument(
        "--search", action="store_true", help="compare settings of the peer instead; nothing is recorded"
    )
    args = parser.parse_args()
    quiet_libraries()
    rows, curves = Table(), {}
    for kind, seed in SEARCHED if args.search else TOYS:
        with tempfile.TemporaryDirectory() as root:
            work = Path(root)
            photographs = write_toy(toybox.random_toy(kind, seed), work)
            config = DreamBoothConfig(
                instance_data_dir=str(photographs), reference_data_dir=str(work / "references"), class_word=kind
            )
            if args.search:
                points = {}
                for settings in CANDIDATES:
                    name = " ".join(map(str, settings.values()))
                    points[name] = peers(args.peer, config, settings, work, name)
            else:
                points = {"peer": peers(args.peer, config, PEER, work), "ours": ours(config, work)}
        curves[f"{kind} {seed}"] = points
        rows.append(
            {"toy": f"{kind} {seed}"} | {_COLUMNS.get(name, name): reached(found) for name, found in points.items()}
        )
        print(rows[-1], flush=True)
        print(json.dumps(curves[f"{kind} {seed}"]), flush=True)
    if not args.search:
        note = (
            f"Seconds until subject fidelity has come {GOAL} of the way from the base's to that of other photographs."
        )
        record("seconds_to_toy", rows, note, curves=curves)


if __name__ == "__main__":
    main()
