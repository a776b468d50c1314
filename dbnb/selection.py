"""When to stop, and which checkpoint is best: one number for what was gained and what was kept.

Subject fidelity grows with the steps while the class word and the words of a prompt lose what they meant; neither tells
when to stop. The rule here is the harmonic mean of three shares, each 1 at best: it is high only where all are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Names in a log: of that number, and of the losses at noise that training never draws, of photographs that it never
# sees and of those that it does.
TRADE_OFF, HELD_OUT, SEEN = "trade_off", "held_out_loss", "seen_loss"


def shares(
    now: Mapping[str, float], before: Mapping[str, float], ceiling: Mapping[str, float] | None = None
) -> dict[str, float]:
    """What a state of the model has gained and kept, against the base before training, each from 0 to 1.

    "subject_gained": how far subject fidelity has come from the base's (0) to that of real photographs (1).
    "prior_kept": how much of its diversity the bare class has kept, or how little it has come to look like the subject
    (on the scale of the first), whichever is less. "prompt_kept": how much of the likeness of pictures to their prompts
    is left. The measures are those of `metrics.evaluate`; what is not among them is left out.
    """
    floor = before["subject_fidelity"]
    span = (ceiling or {}).get("subject_fidelity", 1.0) - floor
    found = {"subject_gained": (now["subject_fidelity"] - floor) / span if span > 0 else 0.0}
    kept = []
    if "class_subject_similarity" in now and span > 0:
        kept.append(1.0 - (now["class_subject_similarity"] - before["class_subject_similarity"]) / span)
    if before.get("class_diversity", 0.0) > 0:
        kept.append(now["class_diversity"] / before["class_diversity"])
    if kept:
        found["prior_kept"] = min(kept)
    if before.get("clip_t", 0.0) > 0:
        found["prompt_kept"] = now["clip_t"] / before["clip_t"]
    return {name: min(1.0, max(0.0, value)) for name, value in found.items()}


def trade_off(found: Mapping[str, float]) -> float:
    """The harmonic mean of shares, 0 where one of them is 0."""
    return len(found) / sum(1.0 / value for value in found.values()) if min(found.values()) > 0 else 0.0


def measured(log: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Step -> trade-off, of the steps of a log that were measured."""
    return {line["step"]: line[TRADE_OFF] for line in log if TRADE_OFF in line}


def best_step(log: Sequence[Mapping[str, Any]]) -> int | None:
    """The measured step of the highest trade-off, the earliest of equal ones; None where none was measured."""
    found = measured(log)
    return max(found, key=lambda step: (found[step], -step)) if found else None


def out_of_patience(log: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether so many measured steps in a row have passed without a better one than all before."""
    best = best_step(log)
    return patience is not None and best is not None and sum(s > best for s in measured(log)) >= patience
