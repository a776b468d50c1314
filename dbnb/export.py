"""Step 7: both adapters in one diffusers file, proof that it reloads, the model card, the hub. Built in notebook 07."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dbnb.adapters import adapted_modules, without_adapters
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig, Sampling, sampling_of
from dbnb.drawing import build_pipeline
from dbnb.files import whole
from dbnb.metrics import metrics_table
from dbnb.models import Components, read_part
from dbnb.outputs import KOHYA_NAME, PUBLISHED, WEIGHT_NAME
from dbnb.presets import PRESETS
from dbnb.tables import Table
from dbnb.validation import draw


def _scales(module: torch.nn.Module) -> dict[str, float]:
    """Layer -> what its adapter's product B A is multiplied by: alpha / rank, or alpha / sqrt(rank)."""
    adapter = next(iter(module.peft_config))
    return {
        name: layer.scaling[adapter]
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.scaling
    }


def adapter_state_dicts(components: Components) -> dict[str, dict[str, torch.Tensor]]:
    """Part -> adapter weights under diffusers' names: A is (rank, inputs), B (outputs, rank), with a kernel's sides."""
    states = {}
    for part, module in adapted_modules(components).items():
        peft_state = get_peft_model_state_dict(module)
        state = peft_state if part == "transformer" else convert_state_dict_to_diffusers(peft_state)
        if part == "unet" and any(".lora_A." in key for key in state):
            # diffusers renames all but added projections, and its loader then drops a half: keep peft's names for all.
            state = peft_state
        if part.startswith("text_encoder") and isinstance(module, CLIPTextModel | CLIPTextModelWithProjection):
            # Newer transformers have no `text_model` level; older diffusers know only names that have it.
            state = {key if key.startswith("text_model.") else f"text_model.{key}": v for key, v in state.items()}
        elif part.startswith("text_encoder"):
            # Of other encoders diffusers reads only these names; for CLIP it converts them itself.
            names = {".lora_A.": ".lora_linear_layer.down.", ".lora_B.": ".lora_linear_layer.up."}
            for old, new in names.items():
                state = {key.replace(old, new): value for key, value in state.items()}
        if part.startswith("text_encoder"):
            # transformers looks for DoRA's magnitudes under this name; by peft's own it takes the base's instead.
            magnitude = ".lora_magnitude_vector"
            state = {f"{key}.weight" if key.endswith(magnitude) else key: value for key, value in state.items()}
        states[part] = {key: value.detach().float().cpu().contiguous() for key, value in state.items()}
    return states


def save_adapters(components: Components, output_dir: Path) -> Path:
    """Write the adapters of denoiser and text encoders to one file with their ranks and alphas; returns its path.

    Raises ValueError where there is no adapter.
    """
    states = adapter_state_dicts(components)
    if not states:
        raise ValueError("There is no adapter to save: call add_adapters and train first.")
    pipeline_class = type(build_pipeline(components))
    layers = {f"{part}_lora_layers": state for part, state in states.items()}
    metadata = _collate_lora_metadata(adapted_modules(components))
    for of_part in metadata.values():
        of_part["base_model_name_or_path"] = None  # a folder of this machine
        of_part["lora_dropout"] = 0.0  # of training alone; layers that diffusers adds would drop out while they draw
    path = Path(output_dir) / WEIGHT_NAME
    with whole(path) as temporary:
        pipeline_class.save_lora_weights(output_dir, weight_name=temporary.name, **layers, **metadata)
    return path


def save_kohya(components: Components, output_dir: Path) -> Path:
    """Write the adapters under the names, and with the alphas, that ComfyUI and A1111 read; returns the path.

    They scale by alpha / rank and know no other way: rsLoRA's alpha / sqrt(rank) is written as alpha * sqrt(rank).
    Raises ValueError for DoRA, whose magnitudes it does not write, and for transformers, which they read as diffusers
    names them.
    """
    if components.network.part != "unet":
        raise ValueError("Kohya files are for bases with a UNet: of this one ComfyUI reads what save_adapters writes.")
    tensors: dict[str, torch.Tensor] = {}
    for part, module in adapted_modules(components).items():
        if module.peft_config["default"].use_dora:
            raise ValueError("save_kohya does not write DoRA's magnitudes: use save_adapters.")
        prefix, weights = part if part == "unet" else f"{part}.text_model", get_peft_model_state_dict(module)
        for name, scale in _scales(module).items():
            halves = {f"{half}.weight": weights[f"{name}.{half}.weight"] for half in ("lora_A", "lora_B")}
            layer = f"{prefix}.{name.removeprefix('text_model.')}"
            state = convert_state_dict_to_kohya({f"{layer}.{half}": value for half, value in halves.items()})
            alpha = torch.tensor(float(scale * len(halves["lora_A.weight"])))  # diffusers writes the rank for alpha
            tensors |= {key: alpha if key.endswith(".alpha") else v.float().cpu() for key, v in state.items()}
    path = Path(output_dir) / KOHYA_NAME
    with whole(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
    return path


_LAYER = re.compile(
    r"(unet|transformer|text_encoder|text_encoder_2)\.(?:text_model\.)?(.+?)\.lora(?:_linear_layer)?[._](A|B|down|up)\."
)


def _shape(layer: torch.nn.Linear | torch.nn.Conv2d) -> list[int]:
    """Of a layer's weight: what is stored of one in fewer bits has another."""
    return [layer.out_features, layer.in_features] if isinstance(layer, torch.nn.Linear) else list(layer.weight.shape)


def load_adapter(pipeline: DiffusionPipeline, adapter: Path) -> None:
    """Load a saved adapter into a pipeline of plain diffusers.

    Raises FileNotFoundError or ValueError, the pipeline unchanged, where the file is missing, cut short, no
    safetensors, or an adapter of another base.
    """
    adapter = Path(adapter)
    if not adapter.is_file():
        raise FileNotFoundError(f"Adapter {adapter} does not exist: give the path of a {WEIGHT_NAME}.")
    if adapter.suffix != ".safetensors":
        raise ValueError(f"Adapter {adapter.name} is no safetensors file, and others could run code: convert it first.")
    try:
        with safe_open(adapter, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"Adapter {adapter.name} cannot be read ({error}): copy it again.") from error
    layers = {key: match for key in shapes if (match := _LAYER.match(key))}
    if not layers:
        raise ValueError(f"{adapter.name} holds no LoRA layers in diffusers' names: is it an adapter?")
    weights = {
        f"{part}.{name.removeprefix('text_model.')}": _shape(module)
        for part in {match[1] for match in layers.values()}
        for name, module in (getattr(pipeline, part).named_modules() if hasattr(pipeline, part) else ())
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }

    def fits(key: str, part: str, name: str, half: str) -> bool:
        # A has the layer's inputs and kernel, B its outputs.
        weight, shape = weights.get(f"{part}.{name}", []), shapes[key]
        return shape[1:] == weight[1:] if half in ("A", "down") else bool(weight) and shape[0] == weight[0]

    strange = [key for key, match in layers.items() if not fits(key, *match.groups())]
    if strange:
        raise ValueError(
            f"{adapter.name} belongs to another base: {len(strange)} of its {len(layers)} tensors do not fit, such as "
            f"{strange[0]}."
        )
    pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)


def reload_pipeline(components: Components, adapter: Path) -> DiffusionPipeline:
    """A fresh pipeline of plain diffusers with the saved adapter: what anyone who downloads it will have.

    Only the parts that carry an adapter are read again; the others are shared with `components`.
    """
    fresh = {}
    for name, module in adapted_modules(components).items():
        frozen = (p.dtype for p in module.parameters() if p.is_floating_point() and not p.requires_grad)
        how = dict(variant=components.variant, quantization=components.quantization)
        fresh[name] = read_part(components.base, name, dtype=next(frozen), **how)
    parts = components.parts() | components.further | fresh
    pipeline = DiffusionPipeline.from_pretrained(
        components.base, use_safetensors=True, variant=components.variant, **parts
    ).to(components.device)
    pipeline.scheduler = build_pipeline(components).scheduler
    load_adapter(pipeline, adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclasses.dataclass(frozen=True)
class _Trained:
    """A part's adapter as it was trained: its weights and scales."""

    weights: dict[str, torch.Tensor]
    scales: dict[str, float]

    @classmethod
    def of(cls, module: torch.nn.Module) -> _Trained:
        """The adapter that sits on a part."""
        name = next(iter(module.peft_config))
        return cls(get_peft_model_state_dict(module, adapter_name=name), _scales(module))


def _other_layers(before: _Trained, reloaded: torch.nn.Module) -> str:
    """Where a reloaded adapter is not the trained one, weight by weight and scale by scale; "" where it is."""
    if not getattr(reloaded, "peft_config", None):
        return f"{type(reloaded).__name__} has no adapter"
    after = _Trained.of(reloaded)
    # Some loaders round to the base's number format.
    other = [
        key
        for key, weight in before.weights.items()
        if key not in after.weights or not torch.equal(weight.to(after.weights[key].dtype), after.weights[key])
    ]
    if other or len(after.weights) != len(before.weights):
        return f"{len(other)} of {len(before.weights)} tensors are not the trained ones"
    other = [name for name, scale in before.scales.items() if not math.isclose(scale, after.scales[name], rel_tol=1e-6)]
    if not other:
        return ""
    return f"{other[0]} is scaled by {after.scales[other[0]]:g} instead of {before.scales[other[0]]:g}"


def verify_reload(components: Components, adapter: Path, concept: Concept, sampling: Sampling | None = None) -> int:
    """Largest difference, in 1/255, between what the trained model and the reloaded adapter draw on the same base.

    Raises ValueError where the file is not what was trained: where its tensors or scales are others, the denoiser
    predicts something else from the same noise and prompt, or the pictures are others as a whole. A single pixel proves
    nothing: in half precision the reloaded adapter is rounded, and a sampler makes much of a little.
    """
    sampling = sampling_of(sampling)
    steps = min(8, sampling.num_inference_steps)
    quick = dataclasses.replace(sampling, num_inference_steps=steps, batch_size=2)
    prompts, photographs = [concept.instance_prompt] * 2, concept.images()

    def drawn(pipeline: DiffusionPipeline | None = None) -> tuple[torch.Tensor, np.ndarray]:
        """The first prediction (later ones start from what earlier ones made), and the pictures."""
        seen: list[torch.Tensor] = []

        def see(module, inputs, output) -> None:
            seen.append(torch.stack(list(output[0])).float())  # some answer with a list of pictures

        hook = components.denoiser.register_forward_hook(see)
        images = draw(components, prompts, quick, seeds=[1, 2], references=photographs, pipeline=pipeline)
        hook.remove()
        return seen[0], np.stack([np.asarray(image, dtype=np.int16) for image in images])

    trained = {part: _Trained.of(module) for part, module in adapted_modules(components).items()}
    drawings = [drawn()]
    with without_adapters(components):  # a second base beside the first would need as much memory again
        pipeline = build_pipeline(components)
        load_adapter(pipeline, adapter)
        why = next(filter(None, (_other_layers(was, getattr(pipeline, part)) for part, was in trained.items())), "")
        drawings.append(drawn(pipeline))
    predictions, pictures = zip(*drawings, strict=True)
    error = ((predictions[0] - predictions[1]).norm() / predictions[0].norm()).item()
    differences = np.abs(pictures[0] - pictures[1])
    if not why and error > (1e-3 if components.dtype == torch.float32 else 0.05):
        why = f"the {components.network.word}'s prediction differs by {error:.1%}"
    if not why and differences.mean() > 16:
        why = f"pixels differ by {differences.mean():.0f}/255 on average"
    if why:
        raise ValueError(f"{adapter} reloads to another picture ({why}): compare versions of diffusers.")
    return int(differences.max())


def _code(text: str) -> str:
    """As code within a line of Markdown: the fence is longer than any run of backticks within."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _prose(text: str) -> str:
    """As plain words within a line of Markdown, whatever marks they hold."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def model_card(
    concept: Concept,
    config: DreamBoothConfig,
    metrics: dict[str, dict[str, float]] | None,
    *,
    has_text_encoder: bool,
    denoiser: str = "UNet",
) -> ModelCard:
    """The card: what it is, how to load it, every hyper-parameter, the metrics, the pictures, a word on consent."""
    hub_id = PRESETS.get(config.base, {}).get("base", config.base)
    local = config.base not in PRESETS and (Path(hub_id).expanduser().exists() or hub_id.count("/") != 1)
    base = Path(hub_id).expanduser().resolve().name if local else hub_id
    data = ModelCardData(
        base_model=hub_id if "/" in hub_id and not local else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "lora", "dreambooth", "dbnb"],
    )
    parts = f"{denoiser} and text encoder" if has_text_encoder else denoiser
    private = {"output_dir", "instance_data_dir", "class_data_dir", "reference_data_dir", "resume_from_checkpoint"}
    private |= {"push_to_hub", "hub_model_id", "base", "concepts"}
    settings = Table(
        {"option": name, "value": " ".join(str(value).split())}
        for name, value in dataclasses.asdict(config).items()
        if name not in private and value is not None
    )
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_prose(f'{concept.identifier} {concept.class_word}')}: a DreamBooth LoRA",
        f"Adapters of rank {config.rank} on the {parts} of {_code(base)}, trained with dbnb on {len(concept.paths)} "
        f"photographs. The prompt {_code(concept.instance_prompt)} draws the subject.",
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("<base>")\n'
        f'pipeline.load_lora_weights("<this folder>", weight_name="{WEIGHT_NAME}")\n'
        f"pipeline({json.dumps(f'{concept.instance_prompt} on the beach', ensure_ascii=False)}).images[0]\n```",
    ]
    pictures = {"before_after.png": "before and after", "loss.png": "loss"}
    lines += [f"![{text}]({name})" for name, text in pictures.items() if (Path(config.output_dir) / name).is_file()]
    if metrics is not None:
        lines += ["## Measured", metrics_table(metrics).markdown()]
    lines += [
        "## Settings",
        settings.markdown(),
        "## Use",
        "Pictures of people, and of what belongs to them, need their consent. The licence of the base model applies.",
    ]
    return ModelCard("\n\n".join(lines) + "\n")


def hub_id(config: DreamBoothConfig) -> str:
    """The repository that an upload goes to: `hub_model_id`, or a name made of identifier and class word."""
    made = re.sub(r"[^A-Za-z0-9]+", "-", f"{config.identifier}-{config.class_word}").strip("-")
    return config.hub_model_id or made[:90] or "dreambooth-lora"


def check_hub(repo_id: str) -> None:
    """Ask the Hub who we are: without a valid name, token or network, an upload would fail after the training.

    Raises ValueError or OSError in one sentence.
    """
    try:
        validate_repo_id(repo_id)
        who = HfApi().whoami()
    except HFValidationError as error:
        raise ValueError(
            f"--hub_model_id {repo_id!r} is not a valid repository name ({_first_line(error)}): give owner/name."
        ) from error
    except Exception as error:  # huggingface_hub and its HTTP library raise a dozen kinds
        raise OSError(
            f"--push_to_hub would fail ({_first_line(error)}): log in with `hf auth login`, check the network, "
            "or leave it out and upload later."
        ) from error
    mine = [who["name"], *(organization["name"] for organization in who.get("orgs", []))]
    owner = repo_id.rpartition("/")[0]
    if owner and owner not in mine:
        raise ValueError(
            f"--hub_model_id {repo_id!r} belongs to {owner!r}, and the token to {who['name']!r}: give a name that "
            f"begins with {' or '.join(f'{name}/' for name in mine)}."
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].rstrip('.:')}"


def push_to_hub(output_dir: Path, repo_id: str, *, dry_run: bool = False, endpoint: str | None = None) -> list[str]:
    """Upload adapter, card, images and metrics, and nothing else; returns the names of the files.

    The token is whatever huggingface_hub has stored. `dry_run` only lists what would go. Raises OSError where it fails,
    with the command that repeats just the upload.
    """
    names = [name for name in PUBLISHED if (Path(output_dir) / name).is_file()]
    if dry_run:
        return names
    try:
        api = HfApi(endpoint=endpoint)
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id  # with its owner
        api.upload_folder(repo_id=repo_id, folder_path=output_dir, allow_patterns=names, commit_message="dbnb adapter")
    except Exception as error:  # huggingface_hub and its HTTP library raise a dozen kinds
        command = ["hf", "upload", repo_id, str(output_dir), "."]
        command += [word for name in names for word in ("--include", name)]
        raise OSError(
            f"The upload to {repo_id} failed ({_first_line(error)}): all results are in {output_dir}, and this repeats "
            f"just the upload: {shlex.join(command)}"
        ) from error
    return names
