"""The two ways from a picture to noise: diffusion and flow matching; what a network is asked on each.

A path knows four things: which times are drawn, what a picture looks like then, what the network should answer, and how
much an error counts. The rest of the workflow is the same on both. Built in notebook 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

from dbnb.config import Objective


def _refuse(objective: Objective, names: tuple[str, ...], why: str) -> None:
    """Raise the ValueError that names the first of these settings which is not at its default."""
    for name in names:
        if (value := getattr(objective, name)) != getattr(Objective, name):
            raise ValueError(f"{name}={value} {why}: leave it out.")


@dataclass(frozen=True)
class Diffusion:
    """x_t = sqrt(a_t) x + sqrt(1 - a_t) noise (Ho et al., 2020, eq. 4), for a whole number t.

    The network answers with the noise, or with v (Salimans and Ho, 2022).
    """

    scheduler: DDPMScheduler
    schedule_class = DDPMScheduler

    @staticmethod
    def check(objective: Objective) -> None:
        """Raise the ValueError that names a setting which is for flow matching only."""
        names = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs")
        _refuse(objective, names, "is for bases that are trained by flow matching, and this one is a diffusion model")

    def draw(self, generator: torch.Generator, objective: Objective, tokens: int) -> torch.Tensor:
        """One timestep, a tensor of shape () that holds a whole number: all are equally likely."""
        return torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator)

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What `latents`, (B, C, h, w), look like with this `noise` at `timesteps`, (B,)."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network should answer, (B, C, h, w). Raises ValueError for a prediction that is not known here."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        raise ValueError(f"The base's scheduler predicts {kind!r}: give a base that predicts epsilon or v_prediction.")

    def weights(self, timesteps: torch.Tensor, objective: Objective) -> torch.Tensor | None:
        """(B,) how much each sample's error counts, or None where all count the same.

        With `snr_gamma` min(SNR, gamma) / SNR, for v / (SNR + 1) (Hang et al., 2023).
        """
        if objective.snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, timesteps)
        epsilon = self.scheduler.config.prediction_type == "epsilon"
        return snr.clamp(max=objective.snr_gamma) / (snr if epsilon else snr + 1.0)


@dataclass(frozen=True)
class Flow:
    """x_s = (1 - s) x + s noise, a straight line (Lipman et al., 2023; Liu et al., 2023), for a share s of noise.

    The network answers with the line's direction, noise - x. It is told 1000 s, which is what `timesteps` are here.
    """

    scheduler: FlowMatchEulerDiscreteScheduler
    schedule_class = FlowMatchEulerDiscreteScheduler

    @staticmethod
    def check(objective: Objective) -> None:
        """Raise the ValueError that names a setting which is for diffusion only, or for another weighting scheme."""
        why = "is for diffusion models, and this base is trained by flow matching"
        _refuse(objective, ("snr_gamma", "noise_offset"), why)
        for scheme, names in {"logit_normal": ("logit_mean", "logit_std"), "mode": ("mode_scale",)}.items():
            if objective.weighting_scheme != scheme:
                _refuse(objective, names, f"needs weighting_scheme={scheme!r}, not {objective.weighting_scheme!r}")

    def draw(self, generator: torch.Generator, objective: Objective, tokens: int) -> torch.Tensor:
        """One timestep, 1000 s, drawn with the density that `weighting_scheme` names (Esser et al., 2024, 3.1).

        s comes from the base's own schedule, shifted towards noise by as much as the base asks for; where it asks for
        `use_dynamic_shifting`, the more `tokens` a picture has, the more.
        """
        given = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}  # the usual ones
        given |= {name: getattr(objective, name) for name in given if getattr(objective, name) is not None}
        share = compute_density_for_timestep_sampling(objective.weighting_scheme, 1, generator=generator, **given)
        top = self.scheduler.config.num_train_timesteps
        sigma = self.scheduler.sigmas[min(int(share * top), top - 1)]
        if self.scheduler.config.use_dynamic_shifting:
            sigma = self.scheduler.time_shift(self.shift(tokens), 1.0, sigma)
        return sigma * top

    def shift(self, tokens: int) -> float:
        """How far a picture of so many tokens is shifted: a straight line through the base's two points."""
        config = self.scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + slope * (tokens - config.base_image_seq_len)

    def sigma(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) timesteps -> (B, 1, 1, 1) shares of noise."""
        return (timesteps / self.scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What `latents`, (B, C, h, w), look like with this `noise` at `timesteps`, (B,)."""
        sigma = self.sigma(timesteps)
        return (1.0 - sigma) * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network should answer, (B, C, h, w): the direction from picture to noise, the same at all times."""
        return noise - latents

    def weights(self, timesteps: torch.Tensor, objective: Objective) -> torch.Tensor | None:
        """(B,) how much each sample's error counts, or None where all count the same.

        "sigma_sqrt" and "cosmap" weigh (Esser et al., 2024); "logit_normal" and "mode" only draw other times. With
        `precondition_outputs` the error is that of the picture x_s - s v instead of v: s^2 times as large.
        """
        sigma = self.sigma(timesteps).flatten()
        weights = None
        if objective.weighting_scheme in ("sigma_sqrt", "cosmap"):
            weights = compute_loss_weighting_for_sd3(objective.weighting_scheme, sigma)
        if objective.precondition_outputs:
            weights = sigma**2 if weights is None else weights * sigma**2
        return weights
