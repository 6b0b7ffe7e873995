"""What checking an entry found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

KINDS = ("right", "wrong", "refused", "not runnable")
COLUMNS = ("mapsurgery", "peft")


@dataclass
class Verdict:
    """The judgement on one entry.

    Attributes:
        kind: one of `KINDS`. "refused": the library said itself what it does not adapt, and did the rest right.
        failures: clause -> message, of each clause that does not hold.
        seconds: of computing.
        sites, live: weights asked for, and those that have a gradient in the plain model.
        notes: clauses that could not be checked, with the reason; refusals.
    """

    name: str
    family: str
    column: str = "mapsurgery"
    kind: str = "right"
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sites: int = 0
    live: int = 0
    dtype: str = ""
    seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Verdict:
        return cls(**json.loads(line))

    @property
    def reason(self) -> str:
        failures = [f"{clause}: {message}" for clause, message in self.failures.items()]
        return "; ".join([*failures, *self.notes])
