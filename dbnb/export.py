"""Step 7: both adapters in one diffusers file, proof that it reloads, the model card, the hub. Built in notebook 07."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dbnb.adapters import adapted_modules
from dbnb.concept import Concept
from dbnb.config import PRESETS, DreamBoothConfig
from dbnb.files import whole
from dbnb.metrics import metrics_table
from dbnb.models import Components
from dbnb.prior import build_pipeline
from dbnb.tables import Table
from dbnb.validation import draw

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "kohya_lora_weights.safetensors"
# All that an upload may contain; checkpoints, logs and settings of this machine stay here.
PUBLISHED = (WEIGHT_NAME, KOHYA_NAME, "README.md", "before_after.png", "loss.png", "metrics.json")


def adapter_state_dicts(components: Components) -> dict[str, dict[str, torch.Tensor]]:
    """Part -> adapter weights under diffusers' names."""
    states = {}
    for part, module in adapted_modules(components).items():
        peft_state = get_peft_model_state_dict(module)
        state = convert_state_dict_to_diffusers(peft_state)
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
        states[part] = {key: value.detach().float().cpu().contiguous() for key, value in state.items()}
    return states


def save_adapters(components: Components, output_dir: Path) -> Path:
    """Write the adapters of UNet and text encoder to one file with their ranks and alphas; returns its path.

    Raises ValueError where there is no adapter.
    """
    states = adapter_state_dicts(components)
    if not states:
        raise ValueError("There is no adapter to save: call add_adapters and train first.")
    pipeline_class = type(build_pipeline(components))
    layers = {f"{part}_lora_layers": state for part, state in states.items()}
    path = Path(output_dir) / WEIGHT_NAME
    with whole(path) as temporary:
        pipeline_class.save_lora_weights(
            output_dir, weight_name=temporary.name, **layers, **_collate_lora_metadata(adapted_modules(components))
        )
    return path


def save_kohya(components: Components, output_dir: Path) -> Path:
    """Write the adapters under the names, and with the alphas, that ComfyUI and A1111 read; returns the path."""
    tensors: dict[str, torch.Tensor] = {}
    for part, module in adapted_modules(components).items():
        prefix = part if part == "unet" else f"{part}.text_model"
        names = {f"{prefix}.{key.removeprefix('text_model.')}": value
                 for key, value in get_peft_model_state_dict(module).items()}  # fmt: skip
        state = convert_state_dict_to_kohya(names)
        # diffusers writes the rank for alpha, whatever the adapter's alpha is.
        alpha = torch.tensor(float(module.peft_config["default"].lora_alpha))
        tensors |= {key: alpha.clone() if key.endswith(".alpha") else v.float().cpu() for key, v in state.items()}
    path = Path(output_dir) / KOHYA_NAME
    with whole(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
    return path


_LAYER = re.compile(
    r"(unet|text_encoder|text_encoder_2)\.(?:text_model\.)?(.+?)\.lora(?:_linear_layer)?[._](A|B|down|up)\."
)


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
        f"{part}.{name.removeprefix('text_model.')}": list(module.weight.shape)
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
    """A fresh pipeline of plain diffusers with the saved adapter: what whoever downloads it will have."""
    pipeline = DiffusionPipeline.from_pretrained(components.base, use_safetensors=True, variant=components.variant)
    if pipeline.unet.dtype != components.dtype:
        pipeline.to(dtype=components.dtype)
    pipeline.to(components.device)
    pipeline.scheduler = build_pipeline(components).scheduler
    load_adapter(pipeline, adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def verify_reload(components: Components, adapter: Path, concept: Concept, config: DreamBoothConfig) -> int:
    """Largest difference, in 1/255, between what the trained model and the reloaded adapter draw.

    Raises ValueError where it is larger than rounding explains: the file is then not what was trained.
    """
    quick = dataclasses.replace(config, num_inference_steps=min(8, config.num_inference_steps), sample_batch_size=2)
    prompts, photographs = [concept.instance_prompt] * 2, concept.images()
    pictures = [
        np.stack([np.asarray(image, dtype=np.int16) for image in
                  draw(components, prompts, quick, seeds=[1, 2], references=photographs, pipeline=pipeline)])
        for pipeline in (build_pipeline(components), reload_pipeline(components, adapter))
    ]  # fmt: skip
    difference = int(np.abs(pictures[0] - pictures[1]).max())
    # In half precision the reloaded adapter is rounded as well, which the trained one is not.
    if difference > (2 if components.dtype == torch.float32 else 32):
        raise ValueError(
            f"{adapter} reloads to another picture (difference {difference}/255): compare versions of diffusers."
        )
    return difference


def model_card(
    concept: Concept, config: DreamBoothConfig, metrics: dict[str, dict[str, float]] | None, *, has_text_encoder: bool
) -> ModelCard:
    """The card: what it is, how to load it, every hyper-parameter, the metrics, the pictures, a word on consent."""
    hub_id = PRESETS.get(config.base, {}).get("base", config.base)
    data = ModelCardData(
        base_model=hub_id if "/" in hub_id and not Path(hub_id).exists() else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "lora", "dreambooth", "dbnb"],
    )
    parts = "UNet and text encoder" if has_text_encoder else "UNet"
    private = {"output_dir", "instance_data_dir", "class_data_dir", "reference_data_dir", "resume_from_checkpoint"}
    private |= {"push_to_hub", "hub_model_id", "base"}
    settings = Table(
        {"option": name, "value": str(value)}
        for name, value in dataclasses.asdict(config).items()
        if name not in private and value is not None
    )
    base = hub_id if not Path(hub_id).exists() else Path(hub_id).name
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {concept.identifier} {concept.class_word}: a DreamBooth LoRA",
        f"Adapters of rank {config.rank} on the {parts} of `{base}`, trained with dbnb on {len(concept.paths)} "
        f"photographs. The prompt `{concept.instance_prompt}` draws the subject.",
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("<base>")\n'
        f'pipeline.load_lora_weights("<this folder>", weight_name="{WEIGHT_NAME}")\n'
        f'pipeline("{concept.instance_prompt} on the beach").images[0]\n```',
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


def push_to_hub(output_dir: Path, repo_id: str, *, dry_run: bool = False, endpoint: str | None = None) -> list[str]:
    """Upload adapter, card, images and metrics, and nothing else; returns the names of the files.

    The token is whatever huggingface_hub has stored. `dry_run` only lists what would go.
    """
    names = [name for name in PUBLISHED if (Path(output_dir) / name).is_file()]
    if not dry_run:
        api = HfApi(endpoint=endpoint)
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=output_dir, allow_patterns=names, commit_message="dbnb adapter")
    return names
