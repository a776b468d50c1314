"""What a run will draw and train, in numbers; how long it will take, once pictures and steps have been timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dbnb.config import DreamBoothConfig

_DURING = 8  # images a prompt set at a validation step, where that many are drawn before and after
_PURPOSES = {
    "class": "class images (less those that are cached)",
    "before": "pictures before training",
    "during": "in the course of it",
    "after": "after it",
    "check": "to check the adapter's file",
}


def images_during(config: DreamBoothConfig) -> int:
    """Images a prompt set at each validation step."""
    return min(_DURING, config.num_validation_images)


def duration(seconds: float) -> str:
    """A time as one would say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


@dataclass
class Forecast:
    """The pictures of a run by purpose, in the order they are drawn, and its steps.

    `tell` gets two sentences: one when the first pictures are timed, one when the first steps are.
    """

    pictures: dict[str, int]
    steps: int
    of_step: str
    tell: Callable[[object], None] = print
    picture_seconds: float | None = None
    _drawn: int = field(default=0, init=False)  # of those that are counted in `pictures` still
    _batches: int = field(default=0, init=False)

    @classmethod
    def of_run(
        cls,
        config: DreamBoothConfig,
        *,
        subjects: int = 1,
        references: int = 0,
        tell: Callable[[object], None] = print,
    ) -> Forecast:
        """What the settings ask for; `references` is how many photographs are redrawn, before and after."""
        count, batch = config.num_validation_images, config.train_batch_size * config.gradient_accumulation_steps
        validations = len(config.validated_steps()) if count else 0
        pictures = {
            "class": subjects * config.num_class_images if config.with_prior_preservation else 0,
            "before": subjects * 3 * count + references if count else 0,
            "during": subjects * (3 if config.measures else 2) * images_during(config) * validations,
            "after": subjects * 4 * count + references if count else 0,
            "check": 4,
        }
        halves = "instance and as many class" if config.with_prior_preservation else "instance"
        return cls({k: n for k, n in pictures.items() if n}, config.max_train_steps, f"{batch} {halves} images", tell)

    def __str__(self) -> str:
        drawn = ", ".join(f"{number} {_PURPOSES[purpose]}" for purpose, number in self.pictures.items())
        return f"This run trains {self.steps} steps of {self.of_step}, and draws {drawn}."

    def done(self, purpose: str) -> None:
        """All pictures for this purpose are there, or are not wanted."""
        self.pictures.pop(purpose, None)
        self._drawn = 0

    def left(self) -> int:
        """Pictures that are still to be drawn."""
        return max(0, sum(self.pictures.values()) - self._drawn)

    def batch_drawn(self, pictures: int, seconds: float) -> None:
        """Note a batch of pictures; the second one is timed, since the first also sets the device up."""
        self._drawn += pictures
        self._batches += 1
        if self._batches == 2:
            self.picture_seconds = seconds / pictures
            self.tell(
                f"A picture takes {self.picture_seconds:.2g} s: {self.left()} more take at most "
                f"{duration(self.left() * self.picture_seconds)}, training apart."
            )

    def step_timed(self, seconds: float, steps: int) -> None:
        """Note the time of a step, of which so many are left: what remains of the run follows from it."""
        training, drawing = seconds * steps, self.left() * (self.picture_seconds or 0.0)
        self.tell(
            f"A step takes {seconds:.2g} s: {steps} more take {duration(training)}, with all pictures "
            f"{duration(training + drawing)}."
        )
