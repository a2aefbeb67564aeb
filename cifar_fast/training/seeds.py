"""The seeds of a training run: one for each kind of random choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from cifar_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Separate seeds for the three kinds of random choices, so that a study can hold two and vary the third.

    A plain number as the seed of a training run stands for all three.
    """

    start: int = 0
    """Seed of the weights before training."""
    order: int = 0
    """Seed of the order in which the images come."""
    augmentation: int = 0
    """Seed of crops, mirroring, cutout and colour jitter, so that an image looks the same in the same epoch, whatever
    the order; and of all that a reader's own functions draw while they train, dropout for instance."""

    def __post_init__(self) -> None:
        """Raise `UserError` for a negative seed."""
        for field in fields(self):
            if (value := getattr(self, field.name)) < 0:
                raise UserError(f"{field.name} seed {value} must be at least 0")

    @classmethod
    def of(cls, seed: int | Seeds | Mapping[str, int]) -> Seeds:
        """Return the seeds that a number, `Seeds` or the result of `plain` stands for."""
        if isinstance(seed, Seeds):
            return seed
        if isinstance(seed, Mapping):
            return cls(**seed)
        if seed < 0:
            raise UserError(f"seed={seed} must be at least 0")
        return cls(start=seed, order=seed, augmentation=seed)

    @property
    def simplest(self) -> int | Seeds:
        """One number if all three are equal, otherwise the seeds themselves."""
        return self.start if self.start == self.order == self.augmentation else self

    def plain(self) -> int | dict[str, int]:
        """Return a number if all three are equal, otherwise the three by name, ready for JSON."""
        return asdict(self) if self.simplest is self else self.start

    def __str__(self) -> str:
        different = self.simplest is self
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items()) if different else str(self.start)
