"""Ours beside diffusers' own DreamBooth script, on the same base, pictures, batch, rank and steps.

    python tests/benchmarks/against_peer.py path/to/train_dreambooth_lora.py

The peer is `examples/dreambooth/train_dreambooth_lora.py` of diffusers; it needs torchvision. Both run in this
environment, alternating; the table has medians and ratios. Equal work comes first: on the peer's own latents, noise,
timesteps and embeddings our step must give the peer's loss to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from dbnb import miniature, training
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig
from dbnb.models import load_components
from dbnb.presets import PRESETS
from dbnb.prior import class_images
from dbnb.tables import Table
from dbnb.toybox.sample import SAMPLE_DIR

_TIMED = Path(__file__).with_name("timed.py")
_CONCEPT, _PHOTOGRAPHS = Concept.from_folder(None, "sks", "dog"), SAMPLE_DIR / "photos"
_PRESET = PRESETS["miniature"]
_WARM = 10  # steps that are not counted
_SAME = {name: _PRESET[name] for name in ("rank", "train_batch_size", "learning_rate", "lr_scheduler")}


def peer_arguments(
    concept: Concept, photographs: str | Path, class_folder: Path, folder: Path, steps: int, further: dict[str, Any]
) -> list[str]:
    """The peer's options for a training with prior preservation at the miniature's resolution."""
    options = {
        "pretrained_model_name_or_path": miniature.path(),
        "instance_data_dir": photographs,
        "instance_prompt": concept.instance_prompt,
        "class_prompt": concept.class_prompt,
        "class_data_dir": class_folder,
        "num_class_images": 100,
        "resolution": _PRESET["resolution"],
        "max_train_steps": steps,
        "output_dir": folder,
        "seed": 0,
    }
    return ["--with_prior_preservation", "--center_crop", *words(options | further)]


def our_arguments(folder: Path, steps: int, *further: str) -> list[str]:
    """The same in ours; the peer knows adapters on attention alone."""
    options = {"instance_data_dir": _PHOTOGRAPHS, "lora_layers": "attention"}
    return [*words(options | _SAME | {"max_train_steps": steps, "output_dir": folder}), *further]


def words(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run(target: str, arguments: list[str], cache: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """One process; its notes. Raises CalledProcessError, with what it said, where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.json"
        command = [sys.executable, str(_TIMED), str(notes), target, *arguments]
        done = subprocess.run(
            command, env=os.environ | {"DBNB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
            done.check_returncode()
        return json.loads(notes.read_text()), load_file(notes.with_suffix(".safetensors"))


def step_seconds(notes: dict) -> float:
    """The median time from the end of one optimizer step to the end of the next."""
    ends = notes["steps"][_WARM:]
    return statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))


def our_loss(first: dict[str, torch.Tensor]) -> float:
    """Our step's loss on what the peer's first step worked on, where adapters change nothing yet."""
    components = load_components("miniature")
    draws = {training.NOISE: first["noise"], training.TIMESTEP: first["timesteps"].long()}
    batch = {"halves": 2, "prompts": list(range(len(first["noise"])))}
    embeds = {number: (row, None) for number, row in enumerate(first["hidden"])}
    with (
        torch.no_grad(),
        mock.patch.object(training, "clean_latents", lambda *_: first["latents"]),
        mock.patch.object(training, "_per_sample", lambda batch, seed, role, draw: draws[role]),
    ):
        return training.training_step(components, batch, seed=0, prompt_embeds=embeds).loss.item()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="training steps of each run whose steps are timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--whole_repeats", type=int, default=1, help="of the whole workflow, which takes minutes")
    args = parser.parse_args()
    rows = Table()

    def the_peers(folder: Path, class_folder: Path, steps: int, *further: str) -> list[str]:
        return [*peer_arguments(_CONCEPT, _PHOTOGRAPHS, class_folder, folder, steps, _SAME), *further]

    def compare(what: str, unit: str, values: dict[str, list[float]]) -> None:
        theirs, ours = (statistics.median(values[name]) for name in ("peer", "ours"))
        digits = 3 if theirs < 1 else 0
        rows.append(
            {
                "": what,
                "peer": f"{theirs:.{digits}f} {unit}",
                "ours": f"{ours:.{digits}f} {unit}",
                "peer / ours": f"{theirs / ours:.2f}",
            }
        )
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as root:
        work = Path(root)
        peer = str(args.peer)
        os.environ["DBNB_CACHE"] = str(work / "cache")
        drawn = class_images(load_components("miniature"), _CONCEPT.class_prompt, 100, DreamBoothConfig().sampling)
        class_folder = work / "class"  # for the peer, which takes every file of a folder for a picture
        class_folder.mkdir()
        for path in drawn.paths:
            shutil.copy(path, class_folder)
        short = ("--num_validation_images", "0", "--checkpointing_steps", "0")
        long = ("--checkpointing_steps", "100000")
        # Frozen, the peer has its own way of encoding prompts once: it gets it.
        settings = {
            "text encoder trained": (("--train_text_encoder",), ("--train_text_encoder",)),
            "text encoder frozen": (("--pre_compute_text_embeddings",), ("--no_train_text_encoder",)),
        }
        for name, (theirs, ours) in settings.items():
            seconds, memory = {"peer": [], "ours": []}, {"peer": [], "ours": []}
            for repeat in range(args.repeats):
                folder = work / f"{name} {repeat}"
                arguments = the_peers(folder / "peer", class_folder, args.steps, *theirs, *long)
                for who, target, options in (
                    ("peer", peer, arguments),
                    ("ours", "dbnb", our_arguments(folder / "ours", args.steps, *ours, *short)),
                ):
                    notes, first = run(target, options, work / "cache")
                    seconds[who].append(step_seconds(notes))
                    memory[who].append(notes["peak_mib"])
                    if who == "peer" and repeat == 0:
                        difference = abs(our_loss(first) - first["loss"].item())
                        assert difference <= 1e-5, f"{name}: our loss differs from the peer's by {difference}"
                        print(f"{name}: the same loss, but for {difference:.1e}", flush=True)
            compare(f"a training step, {name}", "s", seconds)
            compare(f"peak memory, {name}", "MiB", memory)
        # The peer's defaults: the text encoder frozen; four pictures after the first epoch, four at the end.
        pictures = ("--num_validation_images", "4", "--validation_steps", "0")
        settings = {
            "text encoder trained": (("--train_text_encoder",), ("--train_text_encoder",)),
            "the peer's defaults": ((), ("--no_train_text_encoder",)),
        }
        for name, (theirs, ours) in settings.items() if args.whole_repeats else ():
            seconds = {"peer": [], "ours": []}
            for repeat in range(args.whole_repeats):
                folder = work / f"whole {name} {repeat}"
                validation = ("--validation_prompt", _CONCEPT.instance_prompt)
                arguments = the_peers(folder / "peer", folder / "class", 400, *theirs, *validation)
                seconds["peer"].append(run(peer, arguments, folder / "cache")[0]["seconds"])
                arguments = our_arguments(folder / "ours", 400, *ours, *pictures)
                seconds["ours"].append(run("dbnb", arguments, folder / "cache")[0]["seconds"])
            compare(f"100 class images, 400 steps, validation images, {name}", "s", seconds)
    print(f"\n{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}; batch, rank: {_SAME}\n")
    print(rows.markdown())


if __name__ == "__main__":
    main()
