"""The drill for GPUs runs on a CPU at tiny sizes, so that it works on the day."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from families import write


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    return importlib.import_module("gpu")


@pytest.mark.long
def test_the_drill_measures_each_setting_on_each_base(gpu, tmp_path):
    bases = [(name, write(name, tmp_path / name), None) for name in ("sd1", "sdxl")]
    settings = (
        gpu.Setting("bf16"),
        gpu.Setting("no", pairs=2, changed=(("gradient_checkpointing", True), ("lora_layers", "all"))),
        gpu.Setting("bf16", changed=(("use_8bit_adam", True),)),
    )
    rows = gpu.drill(bases, settings, minutes=60.0, steps=4, resolution=32)
    assert [row["base"] for row in rows] == ["sd1", "sdxl"] * 3
    for row in rows[:4]:
        assert float(row["steps a second"]) > 0 and row["reloaded"].endswith("/255")
    assert rows[2]["setting"] == "no, 2 pairs, gradient_checkpointing, lora_layers=all"
    for row in rows[4:]:  # bitsandbytes is not installed for the tests
        assert row["steps a second"].startswith("refused: use_8bit_adam needs bitsandbytes")


@pytest.mark.long
def test_the_drill_ends_in_time_and_goes_on_after_a_setting_that_fails(gpu, tmp_path, monkeypatch):
    base = ("sd1", write("sd1", tmp_path / "sd1"), None)
    [row] = gpu.drill([base], (gpu.Setting("bf16"),), minutes=-1.0, steps=4, resolution=32)
    assert row["steps a second"] == "not run"
    assert gpu.drill([base], (gpu.Setting("bf16"),), minutes=60.0, seen=[row], steps=4, resolution=32) == []
    seen = row | {"base": "sdxl", "steps a second": "1.00"}
    table, note = gpu.shown([row, seen], "On a card.")
    assert table == [seen] and note == "On a card. Never seen on a card: bf16, 1 pair (sd1)."
    for error, word in ((torch.OutOfMemoryError, "out of memory"), (FloatingPointError, "not finite")):

        def failing(*_, error=error, **__):
            raise error("no")

        monkeypatch.setattr(gpu, "train", failing)
        [row] = gpu.drill([base], (gpu.Setting("bf16"),), minutes=60.0, steps=4, resolution=32)
        assert row["steps a second"] == word
