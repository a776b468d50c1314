"""Step 6: one training step as a pure function, and the loop around it. Built in notebook 06."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import GradientAccumulationPlugin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm
from transformers import get_wsd_schedule

from dbnb.adapters import adapted_modules, train_mode, trainable_parameters
from dbnb.checkpoints import check_resume, prune_checkpoints, resume, run_identity, save_checkpoint
from dbnb.config import STABLE_DECAY, DreamBoothConfig, Objective, check_libraries, objective_of
from dbnb.dataset import (
    NOISE,
    OFFSET,
    POSTERIOR,
    SMALL_NOISE,
    TIMESTEP,
    DreamBoothDataset,
    Mixture,
    cache_latents,
    collate_fn,
    loss_weights,
    posterior_parameters,
    seeded,
)
from dbnb.denoisers import Told
from dbnb.models import Components, embed_prompts
from dbnb.outputs import alone, check_writable, keep_apart, read_log, set_aside, write_log
from dbnb.processes import from_first, interrupts, overruled, own_precision, processes
from dbnb.quantization import check_quantization
from dbnb.selection import HELD_OUT, TRADE_OFF, best_step, out_of_patience


@dataclass
class StepRecord:
    """All that one step computed; B instance samples, then B class samples with prior preservation."""

    loss: torch.Tensor  # instance_loss + prior_loss_weight * prior_loss
    instance_loss: torch.Tensor
    prior_loss: torch.Tensor | None
    timesteps: torch.Tensor  # (2B,), from 0 to 1000 as the network is told them
    latents: torch.Tensor  # (2B, C, h, w), clean
    noise: torch.Tensor
    noisy_latents: torch.Tensor
    prediction: torch.Tensor
    target: torch.Tensor


def _per_sample(batch: dict[str, Any], seed: int, role: int, draw: Callable[[torch.Generator], torch.Tensor]):
    """A draw for each sample, instances first, from (seed, role, half, n)."""
    rows = [draw(seeded(seed, role, half, n)) for half in range(batch["halves"]) for n in batch["n"]]
    return torch.stack(rows)


def clean_latents(components: Components, batch: dict[str, Any], seed: int) -> torch.Tensor:
    """What noise is added to, (2B, C, h, w): latents sampled from the VAE's posterior, or pixels without a VAE."""
    device = components.device
    if "latent_parameters" in batch:
        parameters = batch["latent_parameters"].to(device)
    else:
        pixels = batch["pixel_values"].to(device)
        if components.vae is None:
            return pixels
        parameters = torch.stack([posterior_parameters(components.vae, picture) for picture in pixels]).to(device)
    posterior = DiagonalGaussianDistribution(parameters.float())
    shape = posterior.mean.shape[1:]
    noise = _per_sample(batch, seed, POSTERIOR, lambda g: torch.randn(shape, generator=g)).to(device)
    latents = posterior.mean + posterior.std * noise
    if shift := components.vae.config.get("shift_factor"):
        latents = latents - shift
    return latents * components.vae.config.scaling_factor


@torch.no_grad()
def precompute_embeds(
    components: Components, prompts: Sequence[str], *, max_length: int | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Prompt -> (L, D) hidden states and (P,) pooled ones or None: encoded once, while the text encoders are frozen."""
    hidden, pooled = embed_prompts(components, list(prompts), max_length=max_length)
    return {prompt: (hidden[i], None if pooled is None else pooled[i]) for i, prompt in enumerate(prompts)}


def stack_embeds(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings of single prompts, (L, D) and (P,) or None -> of a batch."""
    pooled = [row[1] for row in rows]
    return torch.stack([row[0] for row in rows]), None if pooled[0] is None else torch.stack(pooled)


def _enlarged(components: Components, batch, pixels: torch.Tensor, timesteps: torch.Tensor, seed: int) -> torch.Tensor:
    """The second picture that an upscaling UNet sees: a quarter of the size, enlarged as its pipeline does, noised."""
    small = F.interpolate(pixels, scale_factor=0.25, mode="area")
    large = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear", align_corners=True)
    noise = _per_sample(batch, seed, SMALL_NOISE, lambda g: torch.randn(pixels.shape[1:], generator=g))
    return components.noise_scheduler.add_noise(large, noise.to(pixels.device), timesteps)


def training_step(
    components: Components,
    batch: dict[str, Any],
    *,
    seed: int,
    prior_loss_weight: float = 1.0,
    objective: Objective | None = None,
    prompt_embeds: dict[str, tuple[torch.Tensor, torch.Tensor | None]] | None = None,
    tokenizer_max_length: int | None = None,
    **changed: Any,
) -> StepRecord:
    """The forward process, the prediction and the loss for one batch: a pure function of its arguments.

    The base's path (`dbnb.paths`) says what noise makes of a picture at a drawn time, and what the network should
    answer; loss = instance + `prior_loss_weight` * prior, each a mean of squares (Ruiz et al., 2023, eq. 2).
    `objective` is what else is asked: which times are drawn, how much an error counts then; its `noise_offset` adds so
    much of one number a channel to the noise. `prompt_embeds` holds embeddings by prompt, as `precompute_embeds` makes
    them, where text encoders are frozen. Where the batch has masks, errors count by them. The fields of `objective` can
    be given by name instead, such as `snr_gamma=5`. Raises ValueError for a setting of the other path.
    """
    objective = objective_of(objective, **changed)
    device, path = components.device, components.path
    path.check(objective)
    latents = clean_latents(components, batch, seed)
    shape = latents.shape[1:]
    noise = _per_sample(batch, seed, NOISE, lambda g: torch.randn(shape, generator=g)).to(device)
    if objective.noise_offset:
        shift = _per_sample(batch, seed, OFFSET, lambda g: torch.randn((shape[0], 1, 1), generator=g)).to(device)
        noise = noise + objective.noise_offset * shift
    tokens = shape[1] * shape[2] // components.network.patch**2
    timesteps = _per_sample(batch, seed, TIMESTEP, lambda g: path.draw(g, objective, tokens)).to(device)
    noisy = path.noisy(latents, noise, timesteps)

    if prompt_embeds is None:
        hidden, pooled = embed_prompts(components, batch["prompts"], max_length=tokenizer_max_length)
    else:
        hidden, pooled = stack_embeds([prompt_embeds[prompt] for prompt in batch["prompts"]])
    dtype, seen = components.dtype, noisy
    if components.upscales:
        seen = torch.cat([noisy, _enlarged(components, batch, latents, timesteps, seed)], dim=1)
    pooled = None if pooled is None else pooled.to(dtype)
    told = Told(timesteps, hidden.to(dtype), pooled, components.downsampling * shape[-1])
    prediction = components.network.call(components.denoiser, seen.to(dtype), told)
    if prediction.shape[1] == 2 * shape[0]:  # a learned variance comes as further channels; only the mean is trained
        prediction = prediction.chunk(2, dim=1)[0]

    target = path.target(latents, noise, timesteps)
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    weights = path.weights(timesteps, objective)
    if weights is not None:
        errors = errors * weights.view(-1, 1, 1, 1)
    if "masks" in batch:
        errors = errors * loss_weights(batch, *shape[1:]).to(device)
    halves = errors.chunk(batch["halves"])
    instance_loss = halves[0].mean()
    prior_loss = halves[1].mean() if batch["halves"] == 2 else None
    loss = instance_loss if prior_loss is None else instance_loss + prior_loss_weight * prior_loss
    return StepRecord(loss, instance_loss, prior_loss, timesteps, latents, noise, noisy, prediction, target)


_TIMED = 10  # steps behind the first, which says how long the others take


def _not_finite(record: StepRecord, step: int) -> str:
    """What of a step is not finite, and what to change."""
    if torch.isfinite(record.loss):
        what, remedy = "Another process met a loss that is not finite", "see its message"
    elif not torch.isfinite(record.latents).all():
        what = "The latents are not finite (an autoencoder in float16 overflows)"
        remedy = "use --mixed_precision bf16 or no"
    elif not torch.isfinite(record.prediction).all():
        what, remedy = "The prediction is not finite", "lower the learning rate, or use --mixed_precision no"
    else:
        what, remedy = f"The loss is {record.loss.item()}", "lower the learning rate or --prior_loss_weight"
    return f"{what} at step {step}: {remedy}; the adapters are as they were before that step."


def batch_at(dataset: DreamBoothDataset | Mixture, number: int, batch_size: int) -> dict[str, Any]:
    """Batch number `number` of a run, rebuilt from nothing but its number."""
    return collate_fn([dataset[n] for n in range(number * batch_size, (number + 1) * batch_size)])


@torch.no_grad()
def held_out_loss(
    components: Components,
    dataset: DreamBoothDataset | Mixture,
    *,
    batches: int = 8,
    batch_size: int = 4,
    objective: Objective | None = None,
    tokenizer_max_length: int | None = None,
) -> dict[str, float]:
    """Instance and prior loss at noise and timesteps that training never draws: the same ones at every call."""
    instance, prior = [], []
    for number in range(batches):
        record = training_step(
            components,
            batch_at(dataset, number, batch_size),
            seed=dataset.seed + 2**31,
            objective=objective,
            tokenizer_max_length=tokenizer_max_length,
        )
        instance.append(record.instance_loss.item())
        prior.append(math.nan if record.prior_loss is None else record.prior_loss.item())
    return {"instance_loss": sum(instance) / batches, "prior_loss": sum(prior) / batches}


def optimizer_class(config: DreamBoothConfig) -> Callable[..., torch.optim.Optimizer]:
    """AdamW in one kernel, or bitsandbytes' with state in 8 bits. Raises ValueError where that is not installed."""
    if not config.use_8bit_adam:
        return partial(torch.optim.AdamW, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(f"use_8bit_adam needs bitsandbytes ({error}): pip install bitsandbytes.") from error
    return AdamW8bit


def check_start(config: DreamBoothConfig) -> None:
    """Raise the ValueError, FileNotFoundError or OSError now that training would meet after all else is done.

    Nothing is written, and no folder made.
    """
    check_libraries(config)
    check_quantization(config.quantization, processes().device)
    optimizer_class(config)
    check_resume(config)
    keep_apart(config)
    if processes().is_main_process:
        check_writable(Path(config.output_dir))


def train(
    config: DreamBoothConfig,
    components: Components,
    dataset: DreamBoothDataset | Mixture,
    *,
    on_step: Callable[[int, StepRecord], None] | None = None,
    on_validation: Callable[[int], Mapping[str, float] | None] | None = None,
    on_pace: Callable[[float, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train the adapters for `max_train_steps` and return the log, one dict a step (also in `log.jsonl`).

    What `on_validation` measures is added to the log's line of its step, and where `config.patience` is at an end,
    training ends too. With `select` "best" the best measured step has a checkpoint that stays; the adapters end as the
    last step left them. `on_pace` is told once what a step takes, in seconds, and how many are left.

    Resumes where `config.resume_from_checkpoint` says, bit for bit. Ctrl-C saves a checkpoint and returns (or raises
    KeyboardInterrupt, if that was the last step); SIGTERM saves one and then takes its course. What an earlier run left
    in the folder is put aside (`set_aside`). Several processes share each batch, `train_batch_size` pairs to each, and
    only the first calls back and writes. Raises FloatingPointError before the step in which a loss or gradient is not
    finite, and ValueError where another process trains into the same folder.
    """
    check_start(config)
    with alone(Path(config.output_dir)), own_precision():
        run = _begin(config, components, dataset)
        try:
            return _loop(run, on_step, on_validation, on_pace)
        finally:
            components.to(run.accelerator.device)  # what rested


def ended(config: DreamBoothConfig, log: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a log is that of a whole run: all steps, or those that `patience` left."""
    return not log or log[-1]["step"] >= config.max_train_steps or out_of_patience(log, config.patience)


def _accelerator(config: DreamBoothConfig) -> Accelerator:
    """Devices, processes, precision and trackers, as the settings have them and not its environment."""
    if words := overruled(config):
        processes().print(words)
    return Accelerator(
        cpu=processes().device.type == "cpu",
        mixed_precision=config.mixed_precision,
        # Its environment would otherwise divide our gradients once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=Path(config.output_dir) / "logs",
    )


def _optimizer(config: DreamBoothConfig, components: Components) -> torch.optim.Optimizer:
    """AdamW over all adapters: the denoiser's first, those of the text encoders at a learning rate of their own."""
    groups, denoiser = [], components.network.part
    for part, module in sorted(adapted_modules(components).items(), key=lambda item: item[0] != denoiser):
        rate = config.learning_rate if part == denoiser else config.text_encoder_learning_rate
        groups.append({"params": [p for _, p in trainable_parameters(module)], "lr": rate, "initial_lr": rate})
    betas = (config.adam_beta1, config.adam_beta2)
    return optimizer_class(config)(groups, betas=betas, weight_decay=config.adam_weight_decay, eps=config.adam_epsilon)


@dataclass
class _Run:
    """What the loop has in hand, made once before it."""

    config: DreamBoothConfig
    components: Components
    dataset: DreamBoothDataset | Mixture
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    stepper: AcceleratedOptimizer  # the optimizer, which knows how to unscale half-precision gradients
    schedule: LRScheduler
    identity: dict[str, Any]
    first: int  # steps that are done already
    log: list[dict[str, Any]]
    prompt_embeds: dict[str, tuple[torch.Tensor, torch.Tensor | None]] | None

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes and calls back."""
        return self.accelerator.is_main_process

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All that is trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def to_training(self) -> None:
        """Switch the adapters' dropout on; what no step needs leaves the device, until something is drawn."""
        for module in adapted_modules(self.components).values():
            train_mode(module)
        if self.components.device.type != "cpu":
            for name in idle_parts(self.components, self.dataset, self.prompt_embeds):
                self.components.modules()[name].to("cpu")

    def to_evaluation(self) -> None:
        """Switch it off, and have every part on the device."""
        self.components.to(self.accelerator.device)
        for module in adapted_modules(self.components).values():
            module.eval()

    def shared_mean(self, *values: torch.Tensor | None) -> list[float]:
        """The mean of numbers over all processes, None as 0: what one meets, all must know, or they wait in vain."""
        numbers = [0.0 if value is None else float(value.item()) for value in values]
        return self.accelerator.reduce(torch.tensor(numbers, device=self.accelerator.device), "mean").tolist()

    def record(self, line: dict[str, Any]) -> None:
        """Add a step to the log, and to its file."""
        self.log.append(line)
        if self.writes:
            with (self.output_dir / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def validate(self, step: int, on_validation: Callable[[int], Mapping[str, float] | None] | None) -> None:
        """Draw, and measure where that is asked for: the numbers go to the log and the trackers of every process."""

        def draw() -> Mapping[str, float] | None:
            return on_validation(step) if on_validation is not None else None

        self.to_evaluation()
        if not self.config.measures and not self.config.holdout:
            if self.writes:
                draw()
        elif numbers := from_first(draw):
            self.log[-1] |= numbers
            if self.writes:
                write_log(self.output_dir / "log.jsonl", self.log)
            if self.config.report_to != "none":
                self.accelerator.log(dict(numbers), step=step)
        self.to_training()

    def prune(self, step: int) -> None:
        """Remove old checkpoints, but the one that is to be exported."""
        keep = best_step(self.log) if self.config.select == "best" else None
        prune_checkpoints(self.output_dir, step, self.config.checkpoints_total_limit, keep=keep)

    def save(self, step: int) -> None:
        """Write a checkpoint, from which the run can go on at `step`."""
        scaler = self.accelerator.scaler
        further = {} if scaler is None else {"scaler": scaler.state_dict()}
        further |= {"schedule": self.schedule.last_epoch, "line": self.log[-1]}
        folder = self.output_dir / f"checkpoint-{step}"
        save_checkpoint(folder, self.components, self.optimizer, step, self.identity, **further)


def idle_parts(
    components: Components, dataset: DreamBoothDataset | Mixture, prompt_embeds: Mapping | None
) -> list[str]:
    """The parts that no step needs: text encoders where prompts are encoded already, the VAE where pictures are."""
    idle = [] if prompt_embeds is None else list(components.text_encoders())
    return [*idle, "vae"] if components.vae is not None and dataset.latents else idle


def learning_rates(config: DreamBoothConfig, optimizer: torch.optim.Optimizer, last_epoch: int = -1) -> LRScheduler:
    """The schedule of a run: one of diffusers', or transformers' "warmup_stable_decay".

    The latter holds the learning rate until the last three tenths of the steps, in which it falls to 0 along a line
    (Hu et al., 2024).
    """
    if config.lr_scheduler == STABLE_DECAY:
        return get_wsd_schedule(
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_decay_steps=math.ceil(0.3 * config.max_train_steps),
            num_training_steps=config.max_train_steps,
            decay_type="linear",
            last_epoch=last_epoch,
        )
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        last_epoch=last_epoch,
    )


def _begin(config: DreamBoothConfig, components: Components, dataset: DreamBoothDataset | Mixture) -> _Run:
    """All that comes before the first step: optimizer, checkpoint, schedule, what can be computed once, the log."""
    accelerator = _accelerator(config)
    components.to(accelerator.device)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    if config.gradient_checkpointing:
        components.denoiser.enable_gradient_checkpointing()
        for name in components.text_encoders():
            if name in adapted_modules(components):
                encoder = components.modules()[name]  # transformers renames the call
                getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)()
    optimizer = _optimizer(config, components)
    stepper = accelerator.prepare(optimizer)
    identity = run_identity(config, components, dataset)
    state = resume(config, components, optimizer, identity)
    if accelerator.scaler is not None and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    schedule = learning_rates(config, optimizer, state.get("schedule", 0) - 1)
    if (
        state["step"] < config.max_train_steps
        and components.vae is not None
        and dataset.fixed_crop
        and not dataset.latents
    ):
        cache_latents(dataset, components.vae)
    prompt_embeds = None
    if config.pre_compute_text_embeddings and "text_encoder" not in adapted_modules(components):
        prompt_embeds = precompute_embeds(
            components, dataset.distinct_prompts(), max_length=config.tokenizer_max_length
        )
    log = _open_log(config, state) if accelerator.is_main_process else []
    if config.report_to != "none":
        accelerator.init_trackers("dreambooth")
    return _Run(
        config=config,
        components=components,
        dataset=dataset,
        accelerator=accelerator,
        optimizer=optimizer,
        stepper=stepper,
        schedule=schedule,
        identity=identity,
        first=state["step"],
        log=log,
        prompt_embeds=prompt_embeds,
    )


def _open_log(config: DreamBoothConfig, state: dict[str, Any]) -> list[dict[str, Any]]:
    """The log so far of a run that goes on from a checkpoint, empty for a new one; makes room in its folder.

    Called only when nothing can be refused any more.
    """
    output_dir, step = Path(config.output_dir), state["step"]
    output_dir.mkdir(parents=True, exist_ok=True)
    log = read_log(output_dir / "log.jsonl", step)
    # What was measured at that step came later; another run's line is none of this one's.
    if log and any(log[-1].get(name) != value for name, value in state.get("line", {}).items()):
        log = []
    if previous := set_aside(output_dir, step if log else 0):
        processes().print(f"The earlier results in {output_dir} are now in {previous}.")
    config.save(output_dir / "config.json")
    write_log(output_dir / "log.jsonl", log)
    return log


def _gradients(run: _Run, step: int) -> tuple[dict[str, float], StepRecord]:
    """Forward and backward for one optimizer step; returns the mean losses of all its batches, and the last batch."""
    config, accumulate = run.config, run.config.gradient_accumulation_steps
    sums = {"loss": 0.0, "instance_loss": 0.0, "prior_loss": 0.0}
    for micro in range(accumulate):
        number = (step * accumulate + micro) * run.accelerator.num_processes + run.accelerator.process_index
        batch = batch_at(run.dataset, number, config.train_batch_size)
        with run.accelerator.autocast():
            record = training_step(
                run.components,
                batch,
                seed=config.seed,
                prior_loss_weight=config.prior_loss_weight,
                objective=config.objective,
                prompt_embeds=run.prompt_embeds,
                tokenizer_max_length=config.tokenizer_max_length,
            )
        losses = run.shared_mean(record.loss, record.instance_loss, record.prior_loss)
        if not math.isfinite(losses[0]):
            raise FloatingPointError(_not_finite(record, step + 1))
        run.accelerator.backward(record.loss / accumulate)
        for name, value in zip(sums, losses, strict=True):
            sums[name] += value / accumulate
    if record.prior_loss is None:
        del sums["prior_loss"]
    return sums, record


def _update(run: _Run, step: int) -> dict[str, float]:
    """Clip the gradients, take the optimizer's and the schedule's step; returns the learning rates of this step."""
    parameters = run.parameters
    if run.accelerator.num_processes > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        vector_to_parameters(run.accelerator.reduce(parameters_to_vector(gradients), "mean"), gradients)
    # A bound of infinity scales nothing, and still tells the norm.
    norm = run.accelerator.clip_grad_norm_(parameters, run.config.max_grad_norm or math.inf)
    # With fp16 the scaler meets infinite gradients by design: it skips the step and scales down.
    if not torch.isfinite(norm) and run.accelerator.scaler is None:
        raise FloatingPointError(f"A gradient is not finite at step {step + 1}: lower the learning rate.")
    rates = dict(zip(("lr", "text_encoder_lr"), run.schedule.get_last_lr(), strict=False))
    run.stepper.step()
    if not run.stepper.step_was_skipped:
        run.schedule.step()
    run.stepper.zero_grad(set_to_none=True)
    return rates


def _loop(
    run: _Run,
    on_step: Callable[[int, StepRecord], None] | None,
    on_validation: Callable[[int], Mapping[str, float] | None] | None,
    on_pace: Callable[[float, int], None] | None,
) -> list[dict[str, Any]]:
    """Notebook 06's loop, with what a long run needs besides."""
    config, accelerator, stopped = run.config, run.accelerator, False
    steps, validated = config.max_train_steps, set(config.validated_steps())
    # A run that was killed while it measured goes on with that.
    wanted = [TRADE_OFF] * config.measures + [HELD_OUT] * bool(config.holdout)
    if run.first in validated and run.log and any(name not in run.log[-1] for name in wanted):
        run.validate(run.first, on_validation)
    first = steps if out_of_patience(run.log, config.patience) else run.first
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="train", disable=not run.writes)
    run.to_training()
    with interrupts() as interrupted:
        for step in bar:
            # Dropout is the one draw that torch makes itself: seeding it by the step keeps steps independent.
            torch.manual_seed((config.seed * 1_000_003 + step + (accelerator.process_index << 32)) % 2**64)
            started = time.perf_counter()
            losses, record = _gradients(run, step)
            rates = _update(run, step)
            run.record({"step": step + 1, **losses, **rates, "seconds": round(time.perf_counter() - started, 4)})
            if config.report_to != "none":
                accelerator.log(losses | rates, step=step + 1)
            bar.set_postfix({key: f"{value:.3f}" for key, value in losses.items() if key != "loss"})
            if on_step is not None and run.writes:
                on_step(step, record)
                run.to_training()  # it may have drawn
            if on_pace is not None and step == first + _TIMED:
                on_pace(median(line["seconds"] for line in run.log[-_TIMED:]), steps - step - 1)
            due = bool(config.checkpointing_steps) and (step + 1) % config.checkpointing_steps == 0
            if due and run.writes:
                run.save(step + 1)
                run.prune(step + 1)
            if step + 1 in validated:
                run.validate(step + 1, on_validation)
                if config.select == "best" and run.writes and best_step(run.log) == step + 1:
                    if not due:
                        run.save(step + 1)
                    run.prune(step + 1)
            if stopped := any(run.shared_mean(torch.tensor(interrupted()))):
                if run.writes and not due:
                    run.save(step + 1)
                processes().print(
                    f"\nInterrupted: step {step + 1} is saved; go on with --resume_from_checkpoint latest."
                )
                break
            if out_of_patience(run.log, config.patience):
                words = (
                    f"\nStopped at step {step + 1}: none of the last {config.patience} measured steps was better than "
                )
                processes().print(f"{words}step {best_step(run.log)}.")
                break
    run.to_evaluation()
    if config.report_to != "none":
        accelerator.end_training()
    if stopped and ended(config, run.log):
        raise KeyboardInterrupt  # a whole log would not tell that nothing is to come after it
    return run.log
