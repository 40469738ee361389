"""How often the teachers' first choice is the folder's class: exposes a wrong order of classes,
normalisation or input size before a student is trained on the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

NEAR_CHANCE = 0.1  # of the way from chance to 100 %


@dataclass(frozen=True)
class Agreement:
    """Counts over crops of images that have a class.

    Attributes:
        agreed: crops whose first choice is their class.
        class_C: int64, crops of each class. chosen_C: int64, crops with each first choice.
    """

    agreed: int
    class_C: np.ndarray
    chosen_C: np.ndarray

    @staticmethod
    def of(chosen_B: np.ndarray, class_B: np.ndarray, classes: int) -> Agreement:
        """Count first choices (B,) against the folder's classes (B,), -1 where there is none."""
        known = class_B >= 0
        chosen, right = chosen_B[known].astype(np.int64), class_B[known]
        counts = (np.bincount(values, minlength=classes) for values in (right, chosen))
        return Agreement(int((chosen == right).sum()), *counts)

    def plus(self, other: Agreement | None) -> Agreement:
        """The counts of both."""
        if other is None:
            return self
        return Agreement(
            self.agreed + other.agreed,
            self.class_C + other.class_C,
            self.chosen_C + other.chosen_C,
        )

    @property
    def crops(self) -> int:
        return int(self.class_C.sum())

    @property
    def top1(self) -> float:
        """Percent of the crops whose first choice is the folder's class."""
        return 100 * self.agreed / self.crops

    @property
    def chance(self) -> float:
        """Percent that the same choices would reach on the same images in random order."""
        return 100 * float(self.class_C @ self.chosen_C) / self.crops**2

    @property
    def near_chance(self) -> bool:
        return self.top1 - self.chance < NEAR_CHANCE * (100 - self.chance)

    def to_json(self) -> dict[str, Any]:
        return {"top1": self.top1, "chance": self.chance, "crops": self.crops}
