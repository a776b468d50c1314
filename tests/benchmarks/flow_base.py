"""The embedded flow base beside the miniature's UNet: `python tests/benchmarks/flow_base.py`.

Both draw the same captions of toys that training never saw, which the judge reads, and both are personalised, at the
settings that each suggests.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from results import record
from seconds_to_toy import GOAL, ours, reached

from dbnb import miniature, toybox
from dbnb.config import DreamBoothConfig
from dbnb.drawing import build_pipeline
from dbnb.miniature.data import draw, held_out, labels_of
from dbnb.miniature.evaluate import Judge, accuracy, drawings, frechet, full_caption, renders_of, side_of
from dbnb.models import load_components
from dbnb.tables import Table
from dbnb.toybox.sample import write_toy
from dbnb.workflow import quiet_libraries

TOYS = (("dog", 900),)
BASES = {"UNet": ("miniature", miniature.path()), "flow transformer": ("miniature-flow", miniature.flow_path())}


def drawn(base: str, folder: Path, count: int) -> dict[str, str]:
    """What the judge reads off `count` pictures, their distance to renders of the same labels, seconds for 100."""
    pipeline, judge = build_pipeline(load_components(base)), Judge(miniature.path())
    names = (draw("test", index)[1] for index in range(8 * count))
    names = [n for n in names if not held_out(n["kind"], n["body"], n["scene"])][:count]
    started = time.perf_counter()
    sampling = DreamBoothConfig(base=base).sampling
    changed = {name: getattr(sampling, name) for name in ("num_inference_steps", "max_sequence_length")}
    pictures = drawings(pipeline, [full_caption(n) for n in names], **changed)
    seconds = (time.perf_counter() - started) / count * 100
    right = accuracy(judge(pictures), np.stack([labels_of(n) for n in names]))
    a, b = (judge.features(renders_of(names, seed, side_of(pipeline))) for seed in (1, 2))
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return (
        {f"{name} as asked": f"{share:.1%}" for name, share in right.items()}
        | {"Frechet distance to renders": f"{frechet(judge.features(pictures), a):.1f}"}
        | {"the same between renders": f"{frechet(b, a):.1f}"}
        | {"seconds for 100 pictures": f"{seconds:.0f}", "weights": f"{weights / 1e6:.1f} MB"}
    )


def main() -> None:
    """Measure both, and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="captions that each draws")
    args = parser.parse_args()
    quiet_libraries()
    columns = {}
    for name, (base, folder) in BASES.items():
        columns[name] = drawn(base, folder, args.count)
        for kind, seed in TOYS:
            with tempfile.TemporaryDirectory() as root:
                photographs = write_toy(toybox.random_toy(kind, seed), Path(root))
                config = DreamBoothConfig(
                    base=base,
                    instance_data_dir=str(photographs),
                    reference_data_dir=str(Path(root) / "references"),
                    class_word=kind,
                )
                columns[name][f"seconds to fidelity {GOAL}, {kind} {seed}"] = reached(ours(config, Path(root)))
        print(columns[name], flush=True)
    trained = json.loads((miniature.flow_path() / "training.json").read_text())["stages"]["flow"]
    rows = Table({"": row} | {name: found[row] for name, found in columns.items()} for row in columns["UNet"])
    steps = " and ".join(str(DreamBoothConfig(base=base).num_inference_steps) for base, _ in BASES.values())
    note = (
        f"{args.count} captions, in the steps that each base suggests ({steps}); torch had {torch.get_num_threads()} "
        f"of the cores. The flow transformer was trained for {trained['step']} steps of {trained['batch_size']} "
        "pictures."
    )
    record("flow_base", rows, note)


if __name__ == "__main__":
    main()
