"""The adapter's doctor: each fault is made on purpose, in every naming, and is the one that is found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from families import READS_FLAT_CLIP, one_file, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbnb import doctor, export, lora_checks, plots
from dbnb.adapters import adapted_modules, add_adapters, trainable_parameters
from dbnb.doctor import diagnose
from dbnb.lora_file import read_lora
from dbnb.models import load_components

_ATTENTION = "attentions.0.transformer_blocks.0"
_CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
# Family -> part and name of a few of its layers, with the features that go in and come out.
LAYERS = {
    "sd1": {
        ("unet", f"down_blocks.0.{_ATTENTION}.attn2.to_k"): (768, 320),
        ("unet", f"mid_block.{_ATTENTION}.attn1.to_q"): (1280, 1280),
        ("unet", f"up_blocks.3.{_ATTENTION}.attn2.to_v"): (768, 320),
        ("text_encoder", _CLIP): (768, 768),
    },
    "sd2": {("unet", f"down_blocks.0.{_ATTENTION}.attn2.to_k"): (1024, 320), ("text_encoder", _CLIP): (1024, 1024)},
    "sdxl": {
        ("unet", f"down_blocks.1.{_ATTENTION}.attn2.to_k"): (2048, 640),
        ("text_encoder", _CLIP): (768, 768),
        ("text_encoder_2", _CLIP): (1280, 1280),
    },
    "if": {("unet", "down_blocks.1.attentions.0.add_k_proj"): (2816, 1408)},
    "sd3": {("transformer", "transformer_blocks.0.attn.to_q"): (1536, 1536)},
    "flux": {
        ("transformer", "transformer_blocks.0.attn.to_q"): (3072, 3072),
        ("transformer", "single_transformer_blocks.0.attn.to_q"): (3072, 3072),
    },
    "miniature": {("unet", f"down_blocks.0.{_ATTENTION}.attn2.to_k"): (128, 48)},
}
RANK, ALPHA = 4, 1.0


def _matrices(family: str = "sd1", rank: int = RANK) -> dict:
    """(part, name) -> A and B of a trained adapter: of a size that leaves the base's weights the larger ones."""
    rng = torch.Generator().manual_seed(0)
    return {
        layer: [
            torch.randn(rank, inputs, generator=rng) / math.sqrt(inputs),
            0.2 * torch.randn(outputs, rank, generator=rng),
        ]
        for layer, (inputs, outputs) in LAYERS[family].items()
    }


def _kohya(part: str, name: str) -> str:
    prefix = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}.get(part, "lora_unet")
    return f"{prefix}_{name.replace('.', '_')}"


# Naming -> what a layer is called there, its two matrices, and where its alpha is.
NAMINGS = {
    "diffusers": (lambda part, name: f"{part}.{name}", (".lora_A.weight", ".lora_B.weight"), "header"),
    "diffusers, former": (lambda part, name: f"{part}.{name}", (".lora.down.weight", ".lora.up.weight"), "header"),
    "kohya": (_kohya, (".lora_down.weight", ".lora_up.weight"), "tensor"),
    "PEFT": (lambda part, name: f"base_model.model.{name}", (".lora_A.weight", ".lora_B.weight"), "beside"),
}
every_naming = pytest.mark.parametrize("naming", NAMINGS)


def _written(folder: Path, naming: str, matrices: dict, *, alpha: float | None = ALPHA, told: str = "") -> Path:
    """A file of these matrices in a naming, its alpha where the naming has it, or `told` in another place."""
    called, ends, where = NAMINGS[naming]
    where, path, tensors, metadata = told or where, folder / "adapter.safetensors", {}, {}
    for (part, name), halves in matrices.items():
        key = called(part, name)
        tensors |= {key + end: half for end, half in zip(ends, halves, strict=True) if half is not None}
        if alpha is not None and where == "tensor":
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        elif alpha is not None and where == "header":
            metadata |= {f"{part}.r": RANK, f"{part}.lora_alpha": alpha}
    if alpha is not None and where == "kohya's header":
        metadata = {"ss_network_alpha": str(alpha), "ss_network_dim": str(RANK)}
    elif metadata:
        metadata = {"lora_adapter_metadata": json.dumps(metadata)}
    if alpha is not None and where == "beside":
        (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": alpha}))
    save_file(tensors, path, metadata)
    return path


# PEFT's own prefix is itself what keeps the file from being read, and with it its alpha.
_ALWAYS = {"PEFT": {"prefix_ignored", "text_encoder_ignored", "alpha_lost"}}


@every_naming
@pytest.mark.parametrize("family", LAYERS)
def test_the_family_is_seen_in_every_naming(tmp_path, naming, family):
    file = read_lora(_written(tmp_path, naming, _matrices(family)))
    assert doctor.family_of(file)[0] == family
    assert {layer.part for layer in file.layers} >= {"unet" if "unet" in str(LAYERS[family]) else "transformer"}
    assert not file.strange and file.naming == naming.split(",")[0]


@pytest.mark.parametrize(
    "key, width, family",
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", 2048, "sdxl"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", 3072, "flux"),
        ("diffusion_model.single_blocks.3.linear1.lora_A.weight", 3072, "flux"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", 2432, "sd3"),
        ("transformer.transformer_blocks.30.attn.to_q.lora_A.weight", 3072, None),  # as wide as FLUX, and deeper
        ("transformer.blocks.30.attn1.to_q.lora_A.weight", 1536, None),
        ("lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight", 1024, "sd2"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight", 320, None),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", 320, "sd2"),
        ("down_blocks.2.attentions.0.transformer_blocks.7.attn1.to_q.lora_A.weight", 1280, "sdxl"),
    ],
)
def test_the_family_is_seen_in_names_of_the_original_code_and_in_parts_of_a_model(tmp_path, key, width, family):
    path = tmp_path / "a.safetensors"
    save_file({key: torch.randn(4, width)}, path)
    record = diagnose(path)
    assert record.family == family and record.codes()[-1] == "alpha_unknown" and "half" in record.codes()
    if family is None:
        save_file({key: torch.randn(4, width)}, path, {"ss_base_model_version": "sdxl_base_v1-0"})
        assert diagnose(path).family == "sdxl"


def _zero(matrices):
    return {layer: [a, torch.zeros_like(b)] for layer, (a, b) in matrices.items()}


def _first(matrices, change):
    layer = next(iter(matrices))
    return matrices | {layer: change(*matrices[layer])}


# Fault -> how it is made, and the codes that it is found by.
FAULTS = {
    "none": (lambda m: m, set()),
    "not trained": (_zero, {"zero"}),
    "one layer not trained": (lambda m: _first(m, lambda a, b: [a, 0 * b]), {"zero_layers"}),
    "NaN": (lambda m: _first(m, lambda a, b: [a * math.nan, b]), {"not_finite"}),
    "infinity": (lambda m: _first(m, lambda a, b: [a, b / 0]), {"not_finite"}),
    "burnt": (lambda m: _first(m, lambda a, b: [a, 40 * b]), {"too_strong"}),
    "A without B": (lambda m: _first(m, lambda a, b: [a, None]), {"half"}),
    "B without A": (lambda m: _first(m, lambda a, b: [None, b]), {"half"}),
    "two ranks in one layer": (lambda m: _first(m, lambda a, b: [a, b[:, :2].contiguous()]), {"pair"}),
}


@every_naming
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_no_other(tmp_path, naming, fault):
    make, codes = FAULTS[fault]
    record = diagnose(_written(tmp_path, naming, make(_matrices())))
    assert set(record.codes()) == codes | _ALWAYS.get(naming, set()), record.findings
    assert record.ranks == [RANK] and record.family == "sd1" and record.scale == ALPHA / RANK
    assert json.loads(json.dumps(record.to_dict(), allow_nan=False))["ranks"] == [RANK]
    assert all(finding["text"] in str(record) for finding in record.findings)


@every_naming
def test_mixed_ranks_are_listed_by_part(tmp_path, naming):
    matrices = _matrices() | {
        ("unet", f"down_blocks.1.{_ATTENTION}.attn1.to_q"): [torch.ones(8, 640), torch.ones(640, 8)]
    }
    record = diagnose(_written(tmp_path, naming, matrices, alpha=None))
    assert "mixed_ranks" in record.codes() and record.parts["unet"]["ranks"] == [4, 8] and record.ranks == [4, 8]
    assert record.parts["text_encoder"]["ranks"] == [4]


@every_naming
@pytest.mark.parametrize("alpha, times", [(1.0, 4.0), (16.0, 0.25)])
@pytest.mark.parametrize("told", ["beside", "kohya's header"])
def test_a_lost_alpha_is_told_with_what_it_does_to_the_strength(tmp_path, naming, alpha, times, told):
    record = diagnose(_written(tmp_path, naming, _matrices(), alpha=alpha, told=told))
    texts = [finding["text"] for finding in record.findings if finding["code"] == "alpha_lost"]
    assert len(texts) == 2 and all(f"alpha is lost: it will load at {times:g} x the strength" in text for text in texts)
    assert record.scale == alpha / RANK and record.loads_at == (None if naming == "PEFT" else 1.0)


@every_naming
def test_an_alpha_that_nothing_tells_is_a_remark(tmp_path, naming):
    record = diagnose(_written(tmp_path, naming, _matrices(), alpha=None))
    assert record.codes()[-1] == "alpha_unknown" and record.scale is None and "alpha_lost" not in record.codes()


def test_an_alpha_that_some_layers_lack_is_lost_there(tmp_path):
    path = _written(tmp_path, "kohya", _matrices())
    tensors = load_file(path)
    del tensors[next(key for key in tensors if "mid_block" in key and key.endswith(".alpha"))]
    save_file(tensors, path)
    [found] = diagnose(path).findings
    assert found["code"] == "alpha_lost" and "4 x the strength. 1 of 3 layers of the unet" in found["text"]


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_a_rank_that_the_header_does_not_have_is_told(tmp_path, naming):
    path = _written(tmp_path, naming, _matrices(rank=2), told="header" if naming == "diffusers" else "kohya's header")
    assert "rank_mismatch" in diagnose(path).codes()


def test_rslora_and_dora_are_seen(tmp_path):
    path = _written(tmp_path, "kohya", _matrices())
    tensors = load_file(path)
    save_file(tensors, path, {"ss_network_args": json.dumps({"algo": "lora", "rs_lora": "True"})})
    record = diagnose(path)
    assert record.codes() == ["rslora_lost"] * 2 and record.scale == ALPHA / 2 and record.loads_at == ALPHA / 4
    base = next(key for key in tensors if key.endswith(".lora_up.weight")).removesuffix(".lora_up.weight")
    save_file(tensors | {f"{base}.dora_scale": torch.ones(320, 1)}, path)
    [found] = diagnose(path).findings
    assert found["code"] == "dora" and "leaves kohya's 'dora_scale' out" in found["text"]
    header = {"unet.r": 4, "unet.lora_alpha": 1.0, "unet.use_rslora": True}
    matrices = {layer: halves for layer, halves in _matrices().items() if layer[0] == "unet"}
    path = _written(tmp_path, "diffusers", matrices)
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(header)})
    record = diagnose(path)
    assert record.codes() == ["rslora"] and record.scale == record.loads_at == 0.5


def test_a_large_file_in_float32_is_remarked_and_a_small_or_half_one_not(tmp_path, monkeypatch):
    path = _written(tmp_path, "kohya", _matrices())
    assert diagnose(path).codes() == []
    monkeypatch.setattr(lora_checks, "LARGE", 1)
    assert diagnose(path).codes() == ["float32"]
    save_file({key: tensor.half() for key, tensor in load_file(path).items()}, path)
    assert diagnose(path).codes() == [] and diagnose(path).dtypes == ["float16"]


@pytest.mark.parametrize(
    "prefix, code",
    [("te1.", "text_encoder_ignored"), ("text_encoder_1.", "text_encoder_ignored"), ("", "text_encoder_ignored")],
)
def test_a_text_encoder_under_another_prefix_is_said_to_be_ignored(tmp_path, prefix, code):
    path = _written(tmp_path, "diffusers", _matrices())
    save_file({key.replace("text_encoder.", prefix): value for key, value in load_file(path).items()}, path)
    record = diagnose(path)
    [found] = [found for found in record.findings if found["code"] == code]
    assert repr(prefix) in found["text"] if prefix else "have no prefix" in found["text"]
    assert record.parts["text_encoder"]["layers"] == 1


def test_norms_are_those_of_the_product(tmp_path):
    matrices = _matrices()
    record = diagnose(_written(tmp_path, "diffusers", matrices))
    for (part, _), (a, b) in list(matrices.items())[-2:]:
        [block] = [block for name, block in record.parts[part]["blocks"].items() if name in ("up_blocks.3", "layers.0")]
        assert block["norm"] == pytest.approx(ALPHA / RANK * (b @ a).norm().item(), rel=1e-4)
    assert list(record.parts["unet"]["blocks"]) == ["down_blocks.0", "mid_block", "up_blocks.3"]


def _trained(base: str | Path = "miniature", *, size: float = 0.02, **options):
    """A base with adapters whose weights matter, without training."""
    components = load_components(base)
    add_adapters(components, rank=4, lora_alpha=8, train_text_encoder=True, text_encoder_lora_alpha=8, **options)
    rng = torch.Generator().manual_seed(0)
    for module in adapted_modules(components).values():
        for name, parameter in trainable_parameters(module):
            if "lora_B" in name:
                parameter.data += size * torch.randn(parameter.shape, generator=rng)
    return components


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same adapter of the miniature in diffusers' and in kohya's names."""
    folder, components = tmp_path_factory.mktemp("adapter"), _trained()
    return {"diffusers": export.save_adapters(components, folder), "kohya": export.save_kohya(components, folder)}


@pytest.mark.parametrize("naming", ["diffusers", pytest.param("kohya", marks=READS_FLAT_CLIP)])
def test_a_sound_file_lands_whole_and_changes_a_picture(files, naming):
    record = diagnose(files[naming])  # the miniature's, so on the miniature
    assert record.codes() == [] and record.dropped == [] and record.base == "miniature" == record.family
    assert record.scale == record.loads_at == 2.0 and record.effect > 1 and len(record.pictures) == 2
    assert set(record.parts) == {"unet", "text_encoder"}
    assert all(0 < block["share"] < 1 for part in record.parts.values() for block in part["blocks"].values())


def _changed(files, folder: Path, naming: str, rename=lambda key: key, **metadata) -> Path:
    with safe_open(files[naming], "pt") as file:
        kept = (file.metadata() or {}) | metadata
        tensors = {rename(key): file.get_tensor(key) for key in file.keys()}
    save_file(tensors, folder / "changed.safetensors", {name: text for name, text in kept.items() if text})
    return folder / "changed.safetensors"


@READS_FLAT_CLIP
def test_without_its_header_a_file_loads_at_another_scale(files, tmp_path):
    record = diagnose(_changed(files, tmp_path, "diffusers", lora_adapter_metadata=""), picture=False)
    assert record.codes() == ["alpha_unknown"] and record.loads_at == 1.0
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    record = diagnose(tmp_path / "changed.safetensors", picture=False)
    assert set(record.codes()) == {"alpha_lost"} and "load at 0.5 x the strength" in record.findings[0]["text"]


def test_names_that_the_loader_passes_over_are_dropped_and_nothing_changes(files, tmp_path):
    def as_peft(key: str) -> str:
        key = key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")
        return key.replace("unet.", "base_model.model.").replace("text_encoder.", "te1.")

    path = _changed(files, tmp_path, "diffusers", as_peft)
    record = diagnose(path)
    assert {"prefix_ignored", "text_encoder_ignored", "no_effect"} <= set(record.codes())
    assert set(record.dropped) == set(load_file(path)) and record.effect == 0


@pytest.mark.parametrize(
    "naming, mark", [("diffusers", "attentions.0"), pytest.param("kohya", "attentions_0", marks=READS_FLAT_CLIP)]
)
def test_layers_that_the_base_lacks_are_named(files, tmp_path, naming, mark):
    path = _changed(files, tmp_path, naming, lambda key: key.replace(mark, f"{mark[:-1]}7"))
    record = diagnose(path, picture=False)
    assert "keys_dropped" in record.codes()
    assert record.dropped and all(f"{mark[:-1]}7" in key for key in record.dropped)


def test_what_diffusers_refuses_is_told_with_its_reason(files, tmp_path):
    with safe_open(files["diffusers"], "pt") as file:
        header = file.metadata()["lora_adapter_metadata"].replace('"unet.r": 4', '"unet.r": 8')
    record = diagnose(_changed(files, tmp_path, "diffusers", lora_adapter_metadata=header))
    assert {"refused", "rank_mismatch"} <= set(record.codes()) and record.effect is None


@every_naming
@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_a_file_for_another_family_is_told_so(tmp_path, naming, family):
    record = diagnose(_written(tmp_path, naming, _matrices(family)), "miniature")
    text = next(found["text"] for found in record.findings if found["code"] == "other_family")
    assert text.startswith(f"no key fits this base: made for {doctor.FAMILIES[family]} (")
    assert set(record.dropped) == set(load_file(tmp_path / "adapter.safetensors")) and record.pictures == []


@pytest.mark.long
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "alt", "if"])
@pytest.mark.parametrize("lora_layers", ["attention", "all"])
def test_what_the_workflow_saves_is_sound_on_every_base(tmp_path, family, lora_layers):
    base = write(family, tmp_path / "base")
    path = export.save_adapters(_trained(base, size=0.002, lora_layers=lora_layers), tmp_path)
    record = diagnose(path, base)
    assert record.codes() == [] and record.dropped == [] and record.loads_at == record.scale == 2.0
    assert record.effect > 0


def _not_an_adapter(kind: str, folder: Path) -> Path:
    path = folder / "file.safetensors"
    if kind == "checkpoint":
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(write("sd1", folder / "sd1"))
        save_file(one_file(pipeline), path)
    elif kind == "weights of a UNet":
        save_file({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(3, 3)}, path)
    elif kind == "embedding":
        save_file({"emb_params": torch.zeros(2, 768)}, path)
    elif kind == "LoHa":
        save_file({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.zeros(4, 4)}, path)
    elif kind == "pickle":
        path = folder / "file.bin"
        path.write_bytes(b"\x80\x02")
    elif kind == "cut short":
        path.write_bytes(_written(folder, "kohya", _matrices()).read_bytes()[:1000])
    elif kind == "something else":
        save_file({"weight": torch.zeros(2, 2, 2)}, path)
    return path


@pytest.mark.parametrize(
    "kind, words",
    [
        ("checkpoint", "a whole checkpoint of the family sd15 and no adapter"),
        ("weights of a UNet", "a network's own weights and no adapter"),
        ("embedding", "an embedding of textual inversion"),
        ("LoHa", "an adapter of the kind LoHa and no LoRA"),
        ("pickle", "no safetensors file"),
        ("cut short", "cannot be read"),
        ("something else", "no LoRA layers in any known naming"),
        ("missing", "does not exist"),
    ],
)
def test_what_is_no_lora_is_refused_in_one_sentence(tmp_path, capsys, kind, words):
    path = _not_an_adapter(kind, tmp_path)
    capsys.readouterr()
    assert doctor.main([str(path)]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and said.out == ""


def test_a_base_that_is_none_is_refused(tmp_path, capsys):
    path = _written(tmp_path, "kohya", _matrices())
    assert doctor.main([str(path), "--base", str(tmp_path / "nowhere")]) == 2
    assert "no folder here" in capsys.readouterr().err


@READS_FLAT_CLIP
def test_the_command_prints_data_or_words_and_writes_figures(files, tmp_path, capsys):
    assert doctor.main([str(files["kohya"]), "--json", "--output_dir", str(tmp_path / "figures")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {"family", "ranks", "scale", "parts", "findings"} <= set(record)
    assert record["family"] == "miniature" and record["ranks"] == [4] and record["scale"] == 2.0
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["effect.png", "norms.png"]
    assert doctor.main([str(files["kohya"]), "--no_picture"]) == 0
    assert "findings: none" in capsys.readouterr().out


def test_the_figures_have_words(files):
    record = diagnose(files["diffusers"], picture=False)
    assert plots.html(doctor.norm_figure(record), doctor.norm_alt(record)).alt.startswith("Bars of the adapter's norm")
    with pytest.raises(ValueError, match="No picture was drawn"):
        doctor.effect_figure(record)


def test_a_header_of_anything_harms_nothing(tmp_path):
    path = _written(tmp_path, "kohya", _matrices())
    for text in ("{", "[]", '{"unet.r": "x", "unet.lora_alpha": null}', "\x1b[31m"):
        save_file(load_file(path), path, {"lora_adapter_metadata": text, "ss_network_dim": text, "ss_x": "\x1b[2J"})
        assert "\x1b" not in str(diagnose(path))
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{")
    assert diagnose(path).scale == ALPHA / RANK
