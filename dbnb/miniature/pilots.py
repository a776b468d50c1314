"""Short trainings of several designs, which chose the miniature's: `python -m dbnb.miniature.pilots`.

Each trains the UNet from the same seed, on the same latents and captions in the same order, for the same time;
the judge reads what it then draws. The result, `pilots.json`, is shipped with the base and stands in its card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from dbnb.miniature import design, path
from dbnb.miniature.data import draw, held_out, labels_of
from dbnb.miniature.evaluate import Judge, accuracy, drawings, full_caption
from dbnb.miniature.fit import Stage
from dbnb.miniature.stages import Denoiser, Photographs, as_pipeline, decoder_of, latents_of, train_unet, v_weights
from dbnb.miniature.train import PHOTOGRAPHS, restore

# Name -> what the UNet predicts, the weight of its squared error by the signal-to-noise ratio, its widths.
_WIDTHS = (48, 96, 192)
DESIGNS = {
    "the noise, min-SNR 5": ("epsilon", lambda snr: snr.clamp(max=5.0) / snr, _WIDTHS),
    "the noise, weighted as v": ("epsilon", lambda snr: (snr + 1.0).clamp(max=5.0) / snr, _WIDTHS),
    "v, all errors alike": ("v_prediction", torch.ones_like, _WIDTHS),
    "v, min(SNR + 1, 5)": ("v_prediction", v_weights, _WIDTHS),
    "v, min(SNR + 1, 5), narrower": ("v_prediction", v_weights, (32, 64, 128)),
}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/miniature"), help="where train.py has trained")
    parser.add_argument("--photographs", type=int, default=PHOTOGRAPHS)
    parser.add_argument("--minutes", type=float, default=7.0, help="for each design")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--count", type=int, default=100, help="drawings that the judge reads")
    args = parser.parse_args(argv)
    folder, words, judge = args.output_dir, design.tokenizer(), Judge(path())
    data = Photographs(args.photographs, folder / "data")
    vae, latents = latents_of(data, restore("vae", design.vae(), folder), folder)
    restore("decoder", decoder_of(vae), folder)
    names = (draw("test", index)[1] for index in range(8 * args.count))
    names = [n for n in names if not held_out(n["kind"], n["body"], n["scene"])][: args.count]
    results = []
    for name, (prediction_type, weigh, widths) in DESIGNS.items():
        torch.manual_seed(0)
        clip = restore("clip", design.clip(words), folder)
        schedule = design.scheduler()
        schedule.register_to_config(prediction_type=prediction_type)
        made_from = {"prediction_type": prediction_type, "block_out_channels": widths}
        pilot = folder / "pilots" / name.replace(" ", "-").replace(",", "")
        unet = design.unet(widths)
        stage = Stage(
            name="unet",
            steps=10**6,
            batch_size=24,
            folder=pilot,
            made_from=made_from,
            lr=8e-4,
            minutes=args.minutes,
            mixed_precision=args.mixed_precision,
        )
        model = Denoiser.from_clip(clip, unet)
        train_unet(data, vae, latents, model, stage, noise_schedule=schedule, weigh=weigh)
        pictures = drawings(as_pipeline(vae, words, model, schedule), [full_caption(n) for n in names])
        right = accuracy(judge(pictures), np.stack([labels_of(n) for n in names]))
        steps = torch.load(pilot / "unet.pt", weights_only=True)["step"]
        results.append({"predicts": name, "parameters": unet.num_parameters(), "steps": steps, **right})
        file = {"minutes": args.minutes, "drawings": args.count, "designs": results}
        (folder / "pilots.json").write_text(json.dumps(file, indent=1) + "\n")
        print(json.dumps(results[-1]), flush=True)


if __name__ == "__main__":
    main()
