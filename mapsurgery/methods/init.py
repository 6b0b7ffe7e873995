"""Where an adapter starts. With MAP the start decides: see the README's section on the mathematics."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

KINDS = ("soft", "zero", "random")
A_SCALES = ("weight", "kaiming")


@dataclass(frozen=True)
class Init:
    """Start of beta, A and B; every start leaves the model's output as it was. alpha starts at 0, which is the base.

    Attributes:
        kind:
            "soft": B = 0, beta = `beta` ||W||_F, and ||BA||_F is softened to sqrt(||BA||_F^2 + tau^2) with
            tau = beta/`gain`. Starts as LoRA with scaling `gain` and becomes MAP as ||BA||_F outgrows tau.
            "zero": B = 0, beta = `beta` ||W||_F, tau = 0: the paper's formula (arXiv 2505.23094). The first optimiser
            step moves W by the whole of beta.
            "random": A and B random, beta = 0, tau = 0: the paper's formula, with a random direction to unlearn.
        beta: first beta in units of ||W||_F ("soft" and "zero"; > 0).
        gain: LoRA scaling that "soft" starts with (> 0).
        relative: alpha and beta are trained in units of ||W||_F: the base's magnitude is (1 + alpha) ||W||_F, and not
            ||W||_F + alpha. The same models can be reached; the size of an optimiser's step is another.
        a_scale: size of A's entries. "weight": the root mean square of W's, so that a first optimiser step moves W by
            the same share in every layer (about gain sqrt(r) lr for Adam with "soft"). "kaiming": 1/sqrt(3 K), LoRA's.
    """

    kind: str = "soft"
    beta: float = 0.1
    gain: float = 4.0
    relative: bool = True
    a_scale: str = "weight"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"init kind {self.kind!r} is unknown; choose one of {', '.join(map(repr, KINDS))}")
        for name in ("beta", "gain"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"init {name} must be a positive number, got {value!r}")
        if self.a_scale not in A_SCALES:
            raise ValueError(f"init a_scale {self.a_scale!r} is unknown; choose one of {A_SCALES}")
        if not isinstance(self.relative, bool):
            raise ValueError(f"init relative must be True or False, got {self.relative!r}")

    @property
    def tau(self) -> float:
        """Softening of ||BA||_F in units of ||W||_F."""
        return self.beta / self.gain if self.kind == "soft" else 0.0

    @property
    def first_beta(self) -> float:
        """beta at the start, in units of ||W||_F."""
        return 0.0 if self.kind == "random" else self.beta

    @classmethod
    def parse(cls, value: str | Init) -> Init:
        """An `Init`, or the name of a kind with default numbers.

        Raises:
            ValueError: unknown kind.
            TypeError: neither a string nor an `Init`.
        """
        if isinstance(value, Init):
            return value
        if isinstance(value, str):
            return cls(kind=value)
        raise TypeError(f"init must be a mapsurgery.Init or one of {KINDS}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata."""
        return dataclasses.asdict(self)
