"""Exercises of notebook 03: picking the text encoder's class, and one step towards the picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from dbnb.exercises.checking import NotWritten, Wrong, call, checked, compare, numbers

_KNOWN = {model.__name__: model for model in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)}


@checked
def check_03a(text_encoder_class: Callable) -> str:
    """`text_encoder_class(config, known)`: the class that a text encoder's config names."""
    configs = {
        "Stable Diffusion's text encoder": ("CLIPTextModel", "clip_text_model"),
        "the second text encoder of SDXL": ("CLIPTextModelWithProjection", "clip_text_model"),
        "DeepFloyd IF's text encoder": ("T5EncoderModel", "t5"),
    }
    for whose, (name, model_type) in configs.items():
        found = call(text_encoder_class, {"architectures": [name], "model_type": model_type}, _KNOWN)
        if isinstance(found, str):
            raise Wrong("you return the name of the class: look it up in `known`, and return the class itself.")
        if found is not _KNOWN[name] and name == "CLIPTextModelWithProjection":
            raise Wrong(
                f"{whose} came out as {getattr(found, '__name__', found)}: two classes share the model type "
                f"{model_type!r}; what tells them apart is `architectures`."
            )
        if found is not _KNOWN[name]:
            raise Wrong(f"{whose} is a {name}, and came out as {getattr(found, '__name__', found)}.")
    message = _refusal(text_encoder_class, {"architectures": ["BertModel"], "model_type": "bert"})
    if "BertModel" not in message:
        raise Wrong("your error does not say which architecture is unknown: name it.")
    if not all(name in message for name in _KNOWN):
        raise Wrong("your error does not say which architectures are known: list them, so that the reader can go on.")
    _refusal(text_encoder_class, {"model_type": "bert"})
    return "the base says what it is, and an unknown one is refused in a sentence."


def _refusal(text_encoder_class: Callable, config: dict) -> str:
    """The message of the ValueError that a config of no known architecture should raise."""
    what = f"the unknown architecture {config['architectures'][0]!r}" if "architectures" in config else "a bare config"
    try:
        found = text_encoder_class(config, dict(_KNOWN))
    except ValueError as error:
        return str(error)
    except NotImplementedError as error:
        raise NotWritten("`text_encoder_class` is empty.") from error
    except Exception as error:
        raise Wrong(
            f"{what} raises {type(error).__name__}, whose message tells nobody what to do: raise a ValueError with a "
            "sentence."
        ) from error
    raise Wrong(
        f"{what} gives {getattr(found, '__name__', found)}, and loading it would fail later: raise a ValueError."
    )


@checked
def check_03b(less_noise: Callable) -> str:
    """`less_noise(x, empty, told, guidance_scale, a, a_next)`: guidance, and one step of DDIM."""
    generator = torch.Generator().manual_seed(3)
    x, empty, told = torch.randn(3, 2, 4, 5, 5, generator=generator).double()
    scale, a, a_next = 3.0, 0.4, 0.7

    def step(v: torch.Tensor, a: float = a, a_next: float = a_next) -> torch.Tensor:
        clean, noise = a**0.5 * x - (1 - a) ** 0.5 * v, (1 - a) ** 0.5 * x + a**0.5 * v
        return a_next**0.5 * clean + (1 - a_next) ** 0.5 * noise

    v = empty + scale * (told - empty)
    clean, noise = a**0.5 * x - (1 - a) ** 0.5 * v, (1 - a) ** 0.5 * x + a**0.5 * v
    from_epsilon = (x - (1 - a) ** 0.5 * v) / a**0.5
    compare(
        numbers(call(less_noise, x, empty, told, scale, a, a_next), tuple(x.shape), "The result"),
        step(v),
        {
            "guidance goes the wrong way: start from the answer to the empty prompt, and go towards the other "
            "one.": step(told + scale * (empty - told)),
            "you take the difference of the two answers without the empty prompt's answer that it starts from.": step(
                scale * (told - empty)
            ),
            "without the roots the two shares do not belong to each other: the picture's share is the root of `a`, the "
            "noise's the root of `1 - a`.": a_next * (a * x - (1 - a) * v) + (1 - a_next) * ((1 - a) * x + a * v),
            "you take the answer for the noise itself: this base answers with v, a mix of noise and picture.": (
                a_next**0.5 * from_epsilon + (1 - a_next) ** 0.5 * v
            ),
            "you return the guess of the clean picture: put the noise that belongs to `a_next` back in.": clean,
            "you mix picture and noise with the old `a`, which gives x back: the next step's level is `a_next`.": step(
                v, a_next=a
            ),
            "the sign of the noise is turned round: it is the root of `1 - a` times x plus the root of `a` times "
            "v.": a_next**0.5 * clean - (1 - a_next) ** 0.5 * noise,
        },
        "guidance first, then the guess of the clean picture and of the noise, then both mixed at the level `a_next`.",
    )
    return "guidance and one DDIM step: that was the line hidden in `schedule.step`."
