"""A base in one file, as A1111, ComfyUI and Civitai have it: converted once into a pipeline's folder in the cache."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from pathlib import Path

from dbnb.files import cache_dir, ends
from dbnb.presets import PRESETS, one_file_family


def _configs(repository: str, path: Path) -> Path:
    """The configs and tokenizers of a published base, from this machine or from the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = ["*.json", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # huggingface_hub and its HTTP library raise a dozen kinds
        raise FileNotFoundError(
            f"--base {path} is one file without configs, and those of {repository} are neither on this machine nor to "
            f"be had from the hub ({type(error).__name__}): check the network, or run `hf download {repository} "
            "--include '*.json' --include '*.txt' --include '*.model'` where there is one."
        ) from error


def converted(path: Path) -> Path:
    """The pipeline's folder that a checkpoint in one file becomes; made once, by diffusers' own reader.

    Raises ValueError where it is no whole checkpoint of Stable Diffusion 1, 2 or XL, and FileNotFoundError where the
    configs for it are not available, OSError where the cache cannot be written; nothing is left in it then.
    """
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from filelock import FileLock
    from safetensors import safe_open

    family = one_file_family(path)
    folder = cache_dir() / "bases" / hashlib.sha256(ends(path)).hexdigest()[:16]
    if (folder / "model_index.json").is_file():
        return folder
    configs = _configs(PRESETS[family]["base"], path)
    with safe_open(path, "pt") as file:
        name = next(name for name in file.keys() if name.startswith("model.diffusion_model."))
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(file.get_slice(name).get_dtype(), torch.float32)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{uuid.uuid4().hex}")
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # a second run waits, and finds what the first has made
        if folder.is_dir():
            return folder
        try:
            pipeline_class = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
            pipeline = pipeline_class.from_single_file(
                str(path), config=str(configs), torch_dtype=dtype, local_files_only=True
            )
            pipeline.save_pretrained(temporary)
            temporary.replace(folder)
        except OSError as error:
            raise OSError(
                f"--base {path} cannot be converted to {folder} ({error}): make room, or set DBNB_CACHE elsewhere."
            ) from error
        except Exception as error:  # whatever diffusers meets in a file that is not what its names say
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].rstrip('.')}"
            raise ValueError(
                f"--base {path} cannot be converted ({why}): give a whole checkpoint of Stable Diffusion 1, 2 or XL."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
