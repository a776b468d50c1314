"""A training step alone and beside a busy program, by how threads wait: `python tests/benchmarks/beside.py`.

Every setting is an environment of its own, in a process of its own, since libgomp reads it when torch is loaded. The
settings alternate; each number is the median of all steps of all rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

from results import record

from dbnb.tables import Table

SETTINGS = {
    "threads that spin, as libgomp has them": {"GOMP_SPINCOUNT": "10000000000"},
    "10,000 turns": {"GOMP_SPINCOUNT": "10000"},
    "1,000 turns (dbnb's default)": {"GOMP_SPINCOUNT": "1000"},
    "no turns (OMP_WAIT_POLICY=PASSIVE)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread (OMP_NUM_THREADS=1)": {"OMP_NUM_THREADS": "1"},
}
_ROUNDS, _STEPS = 2, 25


def _steps() -> list[float]:
    """Seconds of training steps with the miniature's default settings, the first ones left out."""
    from dbnb.adapters import add_adapters, trainable_parameters
    from dbnb.concept import Concept
    from dbnb.config import DreamBoothConfig
    from dbnb.dataset import DreamBoothDataset, cache_latents
    from dbnb.models import load_components
    from dbnb.training import batch_at, optimizer_class, precompute_embeds, training_step

    config, concept = DreamBoothConfig(), Concept.from_folder(None, "sks", "dog")
    components = load_components(config.base)
    add_adapters(components, config.adapters)
    # The photographs stand in for class images too: what they show costs nothing.
    dataset = DreamBoothDataset(
        concept.paths,
        concept.instance_prompt,
        class_paths=concept.paths,
        class_prompt=concept.class_prompt,
        size=config.resolution,
    )
    cache_latents(dataset, components.vae)
    embeds = precompute_embeds(components, dataset.distinct_prompts())
    parameters = [parameter for _, parameter in trainable_parameters(components.denoiser)]
    optimizer = optimizer_class(config)(parameters, lr=config.learning_rate)
    seconds = []
    for number in range(_STEPS):
        started = time.perf_counter()
        batch = batch_at(dataset, number, config.train_batch_size)
        training_step(components, batch, seed=0, prompt_embeds=embeds).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds[3:]


def main() -> None:
    """Measure all settings, and record the table."""
    seconds: dict[tuple[str, bool], list[float]] = {}
    for _ in range(_ROUNDS):
        for busy in (False, True):
            program = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            for name, environment in SETTINGS.items():
                command = [sys.executable, __file__, "steps"]
                output = subprocess.run(command, env=os.environ | environment, capture_output=True, check=True).stdout
                seconds.setdefault((name, busy), []).extend(json.loads(output))
            if program is not None:
                program.kill()
    rows = [
        {"how threads wait": name}
        | {
            label: f"{statistics.median(seconds[name, busy]):.2f} s"
            for label, busy in (("alone", False), ("beside a busy program", True))
        }
        for name in SETTINGS
    ]
    record("beside", Table(rows), "One training step of the miniature, four instance and four class images.")


if __name__ == "__main__":
    if sys.argv[1:] == ["steps"]:
        print(json.dumps(_steps()))
    else:
        main()
