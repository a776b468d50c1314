"""The seven steps in a row: what `python -m dbnb` does, and what a notebook does cell by cell."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import transformers
from filelock import FileLock
from PIL import Image, ImageOps

from dbnb import export, metrics, plots
from dbnb.adapters import adapted_modules, add_adapters, lora_targets
from dbnb.concept import SAMPLE_DIR, SHOWN, Concept, inspect_images, load_image, token_report
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset
from dbnb.files import whole
from dbnb.fit import FEWEST, base_fit
from dbnb.models import (
    Components,
    check_base,
    cut_off,
    dtype_of,
    load_components,
    read_tokenizer,
    resolve_base,
    text_architecture,
)
from dbnb.prior import ClassImages, cache_dir, class_images
from dbnb.processes import processes
from dbnb.training import alone, check_start, run_identity, train, versions
from dbnb.validation import SETS, ValidationImages, validation_images


@dataclass
class Session:
    """What steps 1 to 6 make, in the order they make it; `log` is empty until training."""

    config: DreamBoothConfig
    concept: Concept
    components: Components
    prior: ClassImages | None
    dataset: DreamBoothDataset
    log: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Result:
    """What a run produced."""

    adapter: Path
    log: list[dict[str, Any]]
    metrics: dict[str, dict[str, float]] | None
    components: Components
    interrupted: bool = False  # by Ctrl-C, after which there are an adapter and a checkpoint and no more


def quiet_libraries() -> None:
    """Switch off the libraries' own progress bars and advice, which would bury what the workflow says."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def references(config: DreamBoothConfig) -> list[Image.Image]:
    """Further photographs of the subject, which training does not see: the sample's own, or a folder's."""
    folder = config.reference_data_dir
    if folder is None and config.instance_data_dir is None:
        folder = SAMPLE_DIR / "references"
    paths = inspect_images(folder, option="reference_data_dir")[0] if folder else []
    return [load_image(path, max(SHOWN, config.resolution)) for path in paths]


def before_after(
    before: ValidationImages, after: ValidationImages, concept: Concept, references: Sequence[Image.Image] = ()
):  # fmt: skip
    """The figure of a run: the photographs, and the same prompts from the same noise before and after."""
    n = 8
    photos, references = (
        [ImageOps.fit(image, (256, 256), Image.Resampling.LANCZOS) for image in images[:n]]
        for images in (concept.images(), references)
    )
    rows = [photos, before.subject[:n], after.subject[:n], before.scenes[:n], after.scenes[:n]]
    rows += [before.classes[:n], after.classes[:n]]
    subject, bare = concept.instance_prompt, concept.class_prompt
    labels = ["photographs", f"before:\n{subject}", f"after:\n{subject}", "before:\n… in eight places",
              "after:\n… in eight places", f"before:\n{bare}", f"after:\n{bare}"]  # fmt: skip
    if after.sentences:
        rows.append(after.sentences[:n])
        labels.append("after:\nin other sentences")
    if after.redrawn:
        rows += [references[:n], before.redrawn[:n], after.redrawn[:n]]
        labels += ["other photographs", "before:\nredrawn from them", "after:\nredrawn from them"]
    return plots.image_rows(rows, labels=labels)


def _save_figure(figure, path: Path) -> None:
    with whole(path) as temporary:
        figure.savefig(temporary)


def prepare(
    config: DreamBoothConfig,
    *,
    tell: Callable[[object], None] = print,
) -> Session:
    """Steps 1 to 5: the concept, the base, the class images, the adapters, the dataset.

    `tell` gets what was found and decided. The adapters change nothing yet. What would stop the run hours later is
    looked at first.
    """  # fmt: skip
    check_start(config)
    concept = Concept.from_folder(
        config.instance_data_dir, config.identifier, config.class_word, resolution=config.resolution,
        instance_prompt=config.instance_prompt, class_prompt=config.class_prompt,
    )  # fmt: skip
    tell(concept.report())
    base = resolve_base(config.base, revision=config.revision, variant=config.variant)
    check_base(base, resolution=config.resolution, tokenizer_max_length=config.tokenizer_max_length)
    concept.check_tokens(read_tokenizer(base), lowercase=text_architecture(base)[1].lowercase)
    components = load_components(base, weight_dtype=dtype_of(config.mixed_precision), variant=config.variant)
    components.to(processes().device)  # CUDA, or Apple's MPS, where there is one
    tokens = token_report(components.tokenizer, config.identifier)
    tell(f"identifier {tokens.identifier!r} -> {' '.join(tokens.tokens)} {list(tokens.ids)}: {tokens.verdict}")
    for prompt in (*concept.instance_prompts, concept.class_prompt):
        if rest := cut_off(components, prompt, config.tokenizer_max_length):
            tell(f"{prompt!r} is too long: {rest!r} is not read.")

    lora_targets(components.unet, config.lora_layers)  # a name that no layer has is met before class images are drawn
    prior = None
    if config.with_prior_preservation:
        prior = class_images(
            components, concept.class_prompt, config.num_class_images, resolution=config.resolution,
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
            batch_size=config.sample_batch_size, seed=config.seed, class_data_dir=config.class_data_dir,
        )  # fmt: skip
        tell(f"class images: {prior.decision} ({prior.reason})")
        if prior.decision != "own" and len(prior.paths) >= FEWEST:  # the base's own drawings show what it knows
            fit = base_fit(
                components, concept.paths, prior.paths, concept.class_prompt, resolution=config.resolution,
                batch_size=config.train_batch_size,
            )  # fmt: skip
            if remark := fit.remark():
                tell(remark)
    add_adapters(
        components,
        lora_layers=config.lora_layers,
        rank=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        train_text_encoder=config.train_text_encoder,
        text_encoder_rank=config.text_encoder_rank,
        text_encoder_lora_alpha=config.text_encoder_lora_alpha,
        text_encoder_lora_dropout=config.text_encoder_lora_dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        seed=config.seed,
    )
    dataset = DreamBoothDataset(
        concept.paths, concept.instance_prompts, class_paths=prior.paths if prior else (),
        class_prompt=concept.class_prompt, size=config.resolution, center_crop=config.center_crop,
        random_flip=config.random_flip, seed=config.seed,
    )  # fmt: skip
    return Session(config, concept, components, prior, dataset)


def trained(config: DreamBoothConfig, *, tell: Callable[[object], None] = lambda line: None) -> Session:
    """Steps 1 to 6; what an identical run has left in the cache is loaded instead of trained again.

    The cached run is a run like any other, in a folder named by all that decides its weights: the base, the pictures,
    the prompts, the settings.
    """
    session = prepare(config, tell=tell)
    (cache_dir() / "runs").mkdir(parents=True, exist_ok=True)
    decides = run_identity(config, session.components, session.dataset) | versions()
    decides["max_train_steps"] = config.max_train_steps
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    session.config = dataclasses.replace(
        config, output_dir=str(cache_dir() / "runs" / key), resume_from_checkpoint="latest",
        checkpointing_steps=config.max_train_steps,
    )  # fmt: skip
    with FileLock(cache_dir() / "runs" / f"{key}.lock"):  # a second notebook waits for the first one's run
        try:
            session.log = train(session.config, session.components, session.dataset)
        except ValueError as error:  # what is kept there cannot be read
            tell(f"Trained again: {error}")
            shutil.rmtree(session.config.output_dir)
            session.log = train(session.config, session.components, session.dataset)
    if session.log and session.log[-1]["step"] < config.max_train_steps:
        raise KeyboardInterrupt  # train has saved a checkpoint; a half-trained model is not what was asked for
    return session


def measured(
    session: Session, before: ValidationImages, after: ValidationImages, encoders: metrics.Encoders,
    further: Sequence[Image.Image] = (),
) -> dict[str, dict[str, float]]:  # fmt: skip
    """The numbers of a run: what `metrics.json` holds."""
    concept, instances = session.concept, session.concept.images()
    return metrics.report(
        metrics.evaluate(encoders, before, instances, concept.class_prompt),
        metrics.evaluate(encoders, after, instances, concept.class_prompt),
        metrics.ceiling(encoders, session.components, instances, further, session.config.resolution),
    )


def run(config: DreamBoothConfig) -> Result:
    """All seven steps; writes the adapter, figures, log, metrics, settings and card to `config.output_dir`.

    A folder holds the results of one run: `training.set_aside` says what becomes of an earlier one's. Of several
    processes the first alone draws before and after, measures and writes; in the others `metrics` is None. Raises
    OSError where the upload fails, after all else is done.
    """
    with alone(Path(config.output_dir)):
        return _run(config)


def _run(config: DreamBoothConfig) -> Result:
    output_dir = Path(config.output_dir)
    count, further = config.num_validation_images, references(config)
    if config.push_to_hub and processes().is_main_process:
        export.check_hub(export.hub_id(config))
    session = prepare(config, tell=processes().print)
    concept, components = session.concept, session.components
    if not processes().is_main_process:
        log = train(config, components, session.dataset)
        interrupted = bool(log) and log[-1]["step"] < config.max_train_steps
        if interrupted:  # whoever ends first, with an exit code that is not 0, has the launcher end the others
            processes().wait_for_everyone()
        return Result(output_dir / export.WEIGHT_NAME, log, None, components, interrupted)
    print(components)
    before = validation_images(components, concept, config, count=count, references=further) if count else None

    def sample(step: int) -> None:
        now = validation_images(components, concept, config, count=8, sets=("subject", "scenes"))
        folder = output_dir / "samples"
        folder.mkdir(exist_ok=True)
        labels = [concept.instance_prompt, "… in eight places"]
        figure = plots.image_rows([now.subject, now.scenes], labels=labels, title=f"step {step}")
        _save_figure(figure, folder / f"step-{step:06d}.png")

    log = train(config, components, session.dataset, on_validation=sample if count else None)
    adapter = export.save_adapters(components, output_dir)
    if config.export == "kohya":
        export.save_kohya(components, output_dir)
    if log and log[-1]["step"] < config.max_train_steps:  # interrupted: whoever did it does not wait for pictures
        processes().wait_for_everyone()
        return Result(adapter, log, None, components, interrupted=True)
    numbers = None
    if before is not None:
        sets = (*SETS, "sentences")
        after = validation_images(components, concept, config, count=count, references=further, sets=sets)
        _save_figure(before_after(before, after, concept, further), output_dir / "before_after.png")
        try:
            encoders = metrics.load_encoders(components.base)
        except OSError as error:
            print(f"No metrics: the encoders cannot be loaded ({error}).")
        else:
            numbers = measured(session, before, after, encoders, further)
            with whole(output_dir / "metrics.json") as temporary:
                temporary.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    _save_figure(plots.loss_curves(log), output_dir / "loss.png")
    has_text_encoder = "text_encoder" in adapted_modules(components)
    with whole(output_dir / "README.md") as temporary:
        export.model_card(concept, config, numbers, has_text_encoder=has_text_encoder).save(temporary)
    difference = export.verify_reload(components, adapter, concept, config)
    print(
        f"{adapter.name}: {adapter.stat().st_size / 2**20:.2f} MiB, reloads to the same picture (no pixel differs by "
        f"more than {difference}/255)"
    )
    if config.push_to_hub:
        names = export.push_to_hub(output_dir, export.hub_id(config))
        print(f"pushed {', '.join(names)}")
    return Result(adapter, log, numbers, components)
