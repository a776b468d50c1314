"""The seven steps in a row: what `python -m dbnb` does, and what a notebook does cell by cell."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import transformers
from filelock import FileLock
from PIL import Image, ImageOps

from dbnb import export, metrics, plots
from dbnb.adapters import adapted_modules, add_adapters, lora_targets
from dbnb.checkpoints import checkpoints, load_weights, run_identity, versions
from dbnb.concept import Concept
from dbnb.concepts import each_concept
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset, Mixture
from dbnb.drawing import timed
from dbnb.files import cache_dir, whole
from dbnb.fit import FEWEST, base_fit
from dbnb.forecast import Forecast
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
from dbnb.outputs import alone, keep_apart
from dbnb.pictures import SHOWN, inspect_images, load_image, load_mask
from dbnb.prior import ClassImages, class_images
from dbnb.processes import processes
from dbnb.progress import Progress, load_encoders
from dbnb.progress import figure as trade_off_figure
from dbnb.selection import HELD_OUT, SEEN, best_step
from dbnb.tables import printable
from dbnb.tokens import token_report
from dbnb.toybox.sample import SAMPLE_DIR
from dbnb.training import check_start, ended, train
from dbnb.validation import SETS, ValidationImages, validation_images


@dataclass(frozen=True)
class Subject:
    """One subject of a run: its own settings, its concept, its class images."""

    config: DreamBoothConfig
    concept: Concept
    prior: ClassImages | None


@dataclass
class Session:
    """What steps 1 to 6 make, in the order they make it; `log` is empty until training.

    `concept` and `prior` are the first subject's, `subjects` are all of them.
    """

    config: DreamBoothConfig
    concept: Concept
    components: Components
    prior: ClassImages | None
    dataset: DreamBoothDataset | Mixture
    log: list[dict[str, Any]] = field(default_factory=list)
    subjects: tuple[Subject, ...] = ()
    held_out: DreamBoothDataset | Mixture | None = None  # photographs that training does not see


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
):
    """The figure of a run: the photographs, and the same prompts from the same noise before and after."""
    rows = _rows(before, after, concept, references)
    return plots.image_rows([row for _, row in rows], labels=[label for label, _ in rows])


def _rows(
    before: ValidationImages, after: ValidationImages, concept: Concept, references: Sequence[Image.Image]
) -> list[tuple[str, list[Image.Image]]]:
    """The rows of that figure, each with its label; a set that was not drawn has none."""
    n = 8
    photos, references = (
        [ImageOps.fit(image, (256, 256), Image.Resampling.LANCZOS) for image in images[:n]]
        for images in (concept.images(), references)
    )
    subject, bare = concept.instance_prompt, concept.class_prompt
    rows = [
        ("photographs", photos),
        (f"before:\n{subject}", before.subject),
        (f"after:\n{subject}", after.subject),
        ("before:\n… in several places", before.scenes),
        ("after:\n… in several places", after.scenes),
        (f"before:\n{bare}", before.classes),
        (f"after:\n{bare}", after.classes),
        ("after:\nin other sentences", after.sentences),
    ]
    if after.redrawn:
        rows += [
            ("other photographs", references),
            ("before:\nredrawn from them", before.redrawn),
            ("after:\nredrawn from them", after.redrawn),
        ]
    return [(label, row[:n]) for label, row in rows if row]


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
    """
    check_start(config)
    settings = each_concept(config)
    for one in settings:
        keep_apart(one)
    concepts = [_concept(one, tell) for one in settings]
    base = resolve_base(config.base, revision=config.revision, variant=config.variant)
    check_base(
        base,
        resolution=config.resolution,
        tokenizer_max_length=config.tokenizer_max_length,
        objective=config.objective,
        train_text_encoder=config.train_text_encoder,
        quantization=config.quantization,
        export=config.export,
    )
    tokenizer, lowercase = read_tokenizer(base), text_architecture(base)[1].lowercase
    for concept in concepts:
        concept.check_tokens(tokenizer, lowercase=lowercase)
    components = load_components(
        base,
        weight_dtype=dtype_of(config.mixed_precision),
        variant=config.variant,
        quantization=config.quantization,
    )
    components.to(processes().device)  # CUDA, or Apple's MPS, where there is one
    for concept in concepts:
        tokens = token_report(components.tokenizer, concept.identifier)
        tell(f"identifier {tokens.identifier!r} -> {' '.join(tokens.tokens)} {list(tokens.ids)}: {tokens.verdict}")
        for prompt in concept.training_prompts():
            if rest := cut_off(components, prompt, config.tokenizer_max_length):
                tell(f"{prompt!r} is too long: {rest!r} is not read.")

    # A name that no layer has is met before class images are drawn.
    lora_targets(components.denoiser, config.lora_layers)
    subjects = []
    for one, concept in zip(settings, concepts, strict=True):
        prior = None
        if config.with_prior_preservation:
            prior = class_images(
                components,
                concept.class_prompt,
                config.num_class_images,
                config.sampling,
                class_data_dir=one.class_data_dir,
            )
            tell(f"class images: {prior.decision} ({prior.reason})")
            if prior.decision != "own" and len(prior.paths) >= FEWEST:  # the base's own drawings show what it knows
                fit = base_fit(
                    components,
                    concept.paths,
                    prior.paths,
                    concept.class_prompt,
                    resolution=config.resolution,
                    batch_size=config.train_batch_size,
                )
                if remark := fit.remark():
                    tell(remark)
        subjects.append(Subject(one, concept, prior))
    add_adapters(components, config.adapters)
    held_out = _dataset(subjects, held_out=True) if config.holdout else None
    first = subjects[0]
    dataset = _dataset(subjects)
    return Session(config, first.concept, components, first.prior, dataset, subjects=tuple(subjects), held_out=held_out)


def _concept(config: DreamBoothConfig, tell: Callable[[object], None]) -> Concept:
    """Step 1 of one subject, and what it says; the masks, where they are asked for, are looked at too."""
    concept = Concept.from_folder(
        config.instance_data_dir,
        config.identifier,
        config.class_word,
        resolution=config.resolution,
        instance_prompt=config.instance_prompt,
        class_prompt=config.class_prompt,
        holdout=config.holdout,
        captions=config.captions,
    )
    tell(concept.report())
    if config.masked_loss:
        masked = [path.name for path in concept.paths if load_mask(path, config.resolution) is not None]
        if not masked:
            name = concept.paths[0]
            raise ValueError(
                f"masked_loss=True, but no picture has a mask: put {printable(name.stem)}.mask.png beside "
                f"{printable(name.name)} and so on, white on the subject, or leave the option out."
            )
        tell(f"  masks: {len(masked)} of {len(concept.paths)} pictures; those without count everywhere")
    return concept


def _dataset(subjects: Sequence[Subject], *, held_out: bool = False) -> DreamBoothDataset | Mixture:
    """Step 5 for all subjects; `held_out`: the photographs that training does not see, without class images."""
    parts = [
        DreamBoothDataset.of_concept(
            subject.concept,
            subject.prior.paths if subject.prior and not held_out else (),
            held_out=held_out,
            masked=subject.config.masked_loss,
            size=subject.config.resolution,
            center_crop=subject.config.center_crop,
            random_flip=subject.config.random_flip,
            seed=subject.config.seed,
        )
        for subject in subjects
    ]
    return parts[0] if len(parts) == 1 else Mixture(parts, [subject.concept.repeats for subject in subjects])


def trained(
    config: DreamBoothConfig,
    *,
    tell: Callable[[object], None] = lambda line: None,
    on_checkpoint: Callable[[Session, int], None] | None = None,
) -> Session:
    """Steps 1 to 6; what an identical run has left in the cache is loaded instead of trained again.

    The cached run is a run like any other, in a folder named by all that decides its weights: the base, the pictures,
    the prompts, the settings. A checkpoint is kept after each quarter of the steps (third, half): a run that was killed
    goes on from the last one. `on_checkpoint` is called at each of them with the session and the number of steps, but
    not for those that the cache holds already. Raises KeyboardInterrupt where training was interrupted; a checkpoint is
    there then too.
    """
    session = prepare(config, tell=tell)
    (cache_dir() / "runs").mkdir(parents=True, exist_ok=True)
    decides = run_identity(config, session.components, session.dataset) | versions()
    decides["max_train_steps"] = config.max_train_steps
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    parts = next(number for number in (4, 3, 2, 1) if config.max_train_steps % number == 0)  # the last step has one too
    session.config = dataclasses.replace(
        config,
        output_dir=str(cache_dir() / "runs" / key),
        resume_from_checkpoint="latest",
        checkpointing_steps=config.max_train_steps // parts,
        validation_steps=config.max_train_steps // parts,
        checkpoints_total_limit=None,
    )
    shown = None if on_checkpoint is None else partial(on_checkpoint, session)
    with FileLock(cache_dir() / "runs" / f"{key}.lock"):  # a second notebook waits for the first one's run
        try:
            session.log = train(session.config, session.components, session.dataset, on_validation=shown)
        except ValueError as error:  # what is kept there cannot be read
            tell(f"Trained again: {error}")
            shutil.rmtree(session.config.output_dir)
            session.log = train(session.config, session.components, session.dataset, on_validation=shown)
    if not ended(config, session.log):
        raise KeyboardInterrupt  # train has saved a checkpoint; a half-trained model is not what was asked for
    return session


def measured(
    session: Session,
    before: ValidationImages,
    after: ValidationImages,
    encoders: metrics.Encoders,
    further: Sequence[Image.Image] = (),
) -> dict[str, dict[str, float]]:
    """The numbers of a run: what `metrics.json` holds."""
    concept, instances = session.concept, session.concept.images()
    return metrics.report(
        metrics.evaluate(encoders, before, instances, concept.class_prompt),
        metrics.evaluate(encoders, after, instances, concept.class_prompt),
        metrics.ceiling(encoders, session.components, instances, further, session.config.resolution),
    )


def run(config: DreamBoothConfig) -> Result:
    """All seven steps; writes the adapter, figures, log, metrics, settings and card to `config.output_dir`.

    A folder holds the results of one run: `outputs.set_aside` says what becomes of an earlier one's. Of several
    processes the first alone draws before and after, measures and writes; in the others `metrics` is None. Raises
    OSError where the upload fails, after all else is done.
    """
    with alone(Path(config.output_dir)):
        return _run(config)


def _run(config: DreamBoothConfig) -> Result:
    output_dir, tell = Path(config.output_dir), processes().print
    count = config.num_validation_images
    further = [references(one) for one in each_concept(config)]
    if config.push_to_hub and processes().is_main_process:
        export.check_hub(export.hub_id(config))
    forecast = Forecast.of_run(config, subjects=len(further), references=sum(map(len, further)), tell=tell)
    tell(forecast)
    with timed(forecast.batch_drawn) if processes().is_main_process else nullcontext():
        session = prepare(config, tell=tell)
        forecast.done("class")
        components = session.components
        if not processes().is_main_process:
            log = train(config, components, session.dataset)
            interrupted = not ended(config, log)
            if interrupted:  # the first to end with an error has the launcher end the others
                processes().wait_for_everyone()
            return Result(output_dir / export.WEIGHT_NAME, log, None, components, interrupted)
        print(components)
        encoders = load_encoders(config, components.base)
        before = _draw_all(session, count, further, SETS)
        forecast.done("before")
        progress = Progress(
            config,
            components,
            [subject.concept for subject in session.subjects],
            session.dataset,
            before=before,
            references=further,
            held_out=session.held_out,
            encoders=encoders,
        )
        log = train(
            config,
            components,
            session.dataset,
            on_validation=progress if before or session.held_out else None,
            on_pace=forecast.step_timed,
        )
        forecast.done("during")
        return _finish(session, log, before, further, encoders)


def _draw_all(
    session: Session, count: int, further: Sequence[Sequence[Image.Image]], sets: Sequence[str]
) -> list[ValidationImages]:
    """`count` images of each prompt set of each subject, its further photographs redrawn; none where count is 0."""
    return [
        validation_images(
            session.components, subject.concept, session.config.sampling, count=count, references=own, sets=sets
        )
        for subject, own in zip(session.subjects, further, strict=True)
        if count
    ]


def _choose(config: DreamBoothConfig, components: Components, log: Sequence[dict[str, Any]]) -> int | None:
    """With `select` "best", put the weights of the best measured step in place that has a checkpoint; its number."""
    if config.select != "best":
        return None
    folders = {int(path.name.rpartition("-")[2]): path for path in checkpoints(Path(config.output_dir))}
    chosen = best_step([line for line in log if line["step"] in folders])
    if chosen is not None:
        load_weights(folders[chosen], components)
        print(f"Step {chosen} is exported: of those measured it has the best trade-off.")
    return chosen


def _finish(
    session: Session,
    log: list[dict[str, Any]],
    before: Sequence[ValidationImages],
    further: Sequence[Sequence[Image.Image]],
    encoders: metrics.Encoders | None,
) -> Result:
    """Step 7: export, pictures, measures, card, proof that the file reloads, upload."""
    config, components, concept = session.config, session.components, session.concept
    output_dir, numbers = Path(config.output_dir), None
    chosen = _choose(config, components, log)
    adapter = export.save_adapters(components, output_dir)
    if config.export == "kohya":
        export.save_kohya(components, output_dir)
    if not ended(config, log):  # interrupted: the user does not wait for pictures
        processes().wait_for_everyone()
        return Result(adapter, log, None, components, interrupted=True)
    if before:
        after = _draw_all(session, config.num_validation_images, further, (*SETS, "sentences"))
        rows = []
        for subject, old, new, own in zip(session.subjects, before, after, further, strict=True):
            rows += _rows(old, new, subject.concept, own)
        figure = plots.image_rows([row for _, row in rows], labels=[label for label, _ in rows])
        _save_figure(figure, output_dir / "before_after.png")
        try:
            encoders = encoders or metrics.load_encoders(components.base)
        except OSError as error:
            print(f"No metrics: the encoders cannot be loaded ({error}).")
        else:
            numbers = _measure_all(session, before, after, encoders, further)
            with whole(output_dir / "metrics.json") as temporary:
                temporary.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    held_out = {
        label: {line["step"]: line[name] for line in log if name in line}
        for name, label in ((HELD_OUT, "a photograph left out"), (SEEN, "the others, at the same noise"))
    }
    held_out = {label: values for label, values in held_out.items() if values}
    _save_figure(plots.loss_curves(log, held_out=held_out), output_dir / "loss.png")
    if way := trade_off_figure(log, chosen):
        _save_figure(way, output_dir / "trade_off.png")
    has_text_encoder = "text_encoder" in adapted_modules(components)
    with whole(output_dir / "README.md") as temporary:
        card = export.model_card(
            concept, config, numbers, has_text_encoder=has_text_encoder, denoiser=components.network.word
        )
        card.save(temporary)
    difference = export.verify_reload(components, adapter, concept, config.sampling)
    print(
        f"{adapter.name}: {adapter.stat().st_size / 2**20:.2f} MiB, reloads to the same picture (no pixel differs by "
        f"more than {difference}/255)"
    )
    if config.push_to_hub:
        names = export.push_to_hub(output_dir, export.hub_id(config))
        print(f"pushed {', '.join(names)}")
    return Result(adapter, log, numbers, components)


def _measure_all(
    session: Session,
    before: Sequence[ValidationImages],
    after: Sequence[ValidationImages],
    encoders: metrics.Encoders,
    further: Sequence[Sequence[Image.Image]],
) -> dict[str, dict[str, float]]:
    """`measured` of each subject; of several, the names say whose, and "likeness" tells who looks like whom."""
    found: dict[str, dict[str, float]] = {}
    for subject, old, new, own in zip(session.subjects, before, after, further, strict=True):
        one = dataclasses.replace(session, concept=subject.concept, prior=subject.prior)
        numbers = measured(one, old, new, encoders, own)
        if len(session.subjects) == 1:
            return numbers
        for state, values in numbers.items():
            prefixed = {f"{subject.concept.name}: {name}": value for name, value in values.items()}
            found[state] = found.get(state, {}) | prefixed
    photographs = {subject.concept.name: subject.concept.images() for subject in session.subjects}
    pictures = {name: [*new.subject, *new.scenes] for name, new in zip(photographs, after, strict=True)}
    likeness = metrics.who_looks_like_whom(encoders, pictures, photographs)
    print(metrics.likeness_table(likeness))
    return found | {"likeness": {f"{a} like {b}": value for a, row in likeness.items() for b, value in row.items()}}
