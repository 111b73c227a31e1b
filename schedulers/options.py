"""What a user can say about scheduling, as one value, and what a knob of a policy is.

Which knobs there are is said by the policies, each in its own file (policies/); this module knows none of them but the
three that every lossy policy shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_edge.models.errors import UnknownName, UsageError


@dataclass(frozen=True)
class Knob:
    """One choice of a policy: what the command line, the checks and the reports know of it.

    default: its value when nobody says; None: the policy finds one. words: for `--help`. choices: the names it takes;
    else it is a number from least to most (least itself only where `least_too`), or a flag where the default is False.
    is_what: why a value outside is wrong. label: what a message about a wrong name calls it.
    hidden: not on the command line.
    """

    name: str
    default: Any
    words: str
    choices: tuple[str, ...] = ()
    least: float = 0.0
    most: float | None = None
    least_too: bool = True
    is_what: str = ""
    label: str = ""
    hidden: bool = False

    @property
    def option(self) -> str:
        """`--low-level` for low_level."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> None:
        """Raises UnknownName for a name that is not a choice, UsageError for a number out of range."""
        if self.choices:
            if value not in self.choices:
                raise UnknownName(
                    f"unknown {self.label or self.name} '{value}'; known: {', '.join(self.choices)}"
                )
        elif value is not None and not isinstance(value, bool):
            above = value >= self.least if self.least_too else value > self.least
            if not (above and (self.most is None or value <= self.most)):
                raise UsageError(self._out_of_range(value))

    def _out_of_range(self, value: float) -> str:
        called = self.label or self.option
        if self.most is None:
            return f"{called} {value:g} is not {self.is_what}"
        return f"{called} {value:g} is outside {self.least:g} to {self.most:g}; it is {self.is_what}"


LOW_LEVEL = Knob(
    "low_level", "low", "what the uses get that are not high: low, skip", choices=("low", "skip"), label="low level"
)
RENORMALISE = Knob("renormalise", False, "after a skip, scale the token's other gate weights up")
REUSE = Knob("reuse", True, "a high level in memory serves a low wish (DyMoE's conservative reuse)", hidden=True)
SHARED_KNOBS = (LOW_LEVEL, RENORMALISE, REUSE)


@dataclass(frozen=True, init=False)
class PolicyOptions:
    """A policy by name, and its knobs as far as somebody turned them.

    cache: which expert goes when another needs its place, a name of schedulers.eviction.RULES. lookahead: how experts
    of the next layers are predicted and read early. max_kld: choose the setting by this bound (nats per token, against
    exact) from the calibrated table. knobs: (name, value), sorted; `options[KNOB]` is a knob's value or its default.
    """

    name: str
    cache: str
    lookahead: str
    max_kld: float | None
    knobs: tuple[tuple[str, Any], ...]

    def __init__(
        self,
        name: str = "exact",
        *,
        cache: str = "auto",
        lookahead: str = "off",
        max_kld: float | None = None,
        knobs: tuple[tuple[str, Any], ...] = (),
        **more: Any,
    ) -> None:
        """more: knobs by name; they win over those in `knobs`."""
        for field, value in (("name", name), ("cache", cache), ("lookahead", lookahead), ("max_kld", max_kld)):
            object.__setattr__(self, field, value)
        object.__setattr__(self, "knobs", tuple(sorted({**dict(knobs), **more}.items())))

    def __getitem__(self, knob: Knob) -> Any:
        return dict(self.knobs).get(knob.name, knob.default)

    def turned(self) -> Iterator[tuple[str, Any]]:
        """The knobs that were set, by name."""
        yield from self.knobs

    def to_json(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Everything as one flat object. defaults: knob -> value, of the knobs that nobody turned."""
        return {
            "name": self.name, **defaults, **dict(self.knobs), "cache": self.cache, "lookahead": self.lookahead,
            "max_kld": self.max_kld,
        }  # fmt: skip
