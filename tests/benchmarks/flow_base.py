"""A flow base beside the miniature's UNet: `python tests/benchmarks/flow_base.py runs/sd3`.

Both draw the same captions of toys that training never saw, which the judge reads, and both are personalised at the
defaults of the command. The flow base draws in twice as many steps, since Euler's method is of a lower order than the
UNet's solver.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from results import record
from seconds_to_toy import GOAL, ours, reached

from dbnb import miniature, toybox
from dbnb.config import DreamBoothConfig
from dbnb.drawing import build_pipeline
from dbnb.miniature.data import draw, held_out, labels_of
from dbnb.miniature.evaluate import Judge, accuracy, drawings, frechet, full_caption, renders_of, side_of
from dbnb.miniature.flow import FEW
from dbnb.models import load_components
from dbnb.tables import Table
from dbnb.toybox.sample import write_toy
from dbnb.workflow import quiet_libraries

TOYS = (("dog", 900),)
_STEPS = {"UNet": 6, "flow transformer": 12}


def drawn(base: Path, steps: int, count: int) -> dict[str, str]:
    """What the judge reads off `count` pictures, their distance to renders of the same labels, seconds for 100."""
    pipeline, judge = build_pipeline(load_components(str(base))), Judge(miniature.path())
    names = (draw("test", index)[1] for index in range(8 * count))
    names = [n for n in names if not held_out(n["kind"], n["body"], n["scene"])][:count]
    started = time.perf_counter()
    # Without a T5, as many of its empty tokens as are needed at least: they cost time and say nothing.
    length = FEW if hasattr(pipeline, "transformer") else None
    pictures = drawings(
        pipeline, [full_caption(n) for n in names], num_inference_steps=steps, max_sequence_length=length
    )
    seconds = (time.perf_counter() - started) / count * 100
    right = accuracy(judge(pictures), np.stack([labels_of(n) for n in names]))
    a, b = (judge.features(renders_of(names, seed, side_of(pipeline))) for seed in (1, 2))
    weights = sum(path.stat().st_size for path in base.rglob("*.safetensors"))
    return (
        {f"{name} as asked": f"{share:.1%}" for name, share in right.items()}
        | {"Frechet distance to renders": f"{frechet(judge.features(pictures), a):.1f}"}
        | {"the same between renders": f"{frechet(b, a):.1f}"}
        | {"seconds for 100 pictures": f"{seconds:.0f}", "weights": f"{weights / 1e6:.1f} MB"}
    )


def main() -> None:
    """Measure both, and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flow", type=Path, help="the folder that `python -m dbnb.miniature.flow --ship` has written")
    parser.add_argument("--count", type=int, default=300, help="captions that each draws")
    args = parser.parse_args()
    quiet_libraries()
    columns = {}
    for name, base in {"UNet": miniature.path(), "flow transformer": args.flow}.items():
        columns[name] = drawn(base, _STEPS[name], args.count)
        for kind, seed in TOYS:
            with tempfile.TemporaryDirectory() as root:
                photographs = write_toy(toybox.random_toy(kind, seed), Path(root))
                config = DreamBoothConfig(
                    base="miniature" if name == "UNet" else str(args.flow),
                    tokenizer_max_length=None if name == "UNet" else FEW,
                    instance_data_dir=str(photographs),
                    reference_data_dir=str(Path(root) / "references"),
                    class_word=kind,
                )
                columns[name][f"seconds to fidelity {GOAL}, {kind} {seed}"] = reached(ours(config, Path(root)))
        print(columns[name], flush=True)
    trained = json.loads((args.flow / "training.json").read_text())["stages"]["flow"]
    rows = Table({"": row} | {name: found[row] for name, found in columns.items()} for row in columns["UNet"])
    note = (
        f"{args.count} captions; {_STEPS['UNet']} steps of the default solver for the UNet, "
        f"{_STEPS['flow transformer']} of Euler's for the flow transformer, which was trained for {trained['step']} "
        f"steps of {trained['batch_size']} pictures in {trained['minutes']:.0f} minutes."
    )
    record("flow_base", rows, note)


if __name__ == "__main__":
    main()
