"""A search space: the decisions to take, the formats each may choose, and what is fixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.formats import FormatError, NumericFormat, format_name, numeric_format
from aqt_search.outline import outline
from aqt_search.quantizer import Quantizer, quantizer, stack_quantizers
from aqt_search.rules import FormatSpec, assign, match_rules, site_formats
from aqt_search.sites import Site, SiteFormats

_UNQUANTIZED = numeric_format("fp32")  # an option of None: float32 rounds to itself


class SpaceError(ValueError):
    """A search space that leaves nothing to choose, or a target outside of its range."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """One thing to choose: the option taken holds for all its sites."""

    name: str
    sites: tuple[str, ...]
    options: tuple[FormatSpec, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The options' names, for tables and files."""
        return tuple(_label(option) for option in self.options)


def _stacked(site: str, column: Sequence[NumericFormat | Quantizer | None]) -> Quantizer:
    given = [quantizer(spec) for spec in column if spec is not None]
    unquantized = dataclasses.replace(given[0], fmt=_UNQUANTIZED)
    try:
        return stack_quantizers([unquantized if spec is None else spec for spec in column])
    except FormatError as error:
        raise SpaceError(f"Site {site!r}: {error}") from error


@outline
def _gather(table: NumericFormat, rows: jax.Array) -> NumericFormat:
    """Element rows[i] of row i of every column."""
    every = np.arange(len(rows))
    return jax.tree.map(lambda column: column[every, rows], table)


def _label(option: FormatSpec) -> str:
    if isinstance(option, Mapping):
        return ",".join(f"{key}={value}" for key, value in sorted(option.items()))
    if isinstance(option, NumericFormat):
        return str(format_name(option))
    return "none" if option is None else str(option)


@dataclasses.dataclass(frozen=True)
class Space:
    """All decisions over a model's sites.

    A point of the space is an array `choices` [decisions] of option numbers; a policy holds one
    number per decision and option in arrays [decisions, max_options], with `mask` False where a
    decision has fewer options.
    """

    sites: Mapping[str, Site]
    decisions: tuple[Decision, ...]
    fixed: Mapping[str, SiteFormats]  # the sites that no decision covers

    @property
    def max_options(self) -> int:
        """Options of the decision that has most."""
        return max(len(d.options) for d in self.decisions)

    @property
    def mask(self) -> np.ndarray:
        """[decisions, max_options], bool: which options exist."""
        return np.array([np.arange(self.max_options) < len(d.options) for d in self.decisions])

    def assignment(self, choices: jax.typing.ArrayLike) -> dict[str, SiteFormats]:
        """The formats of every site under `choices` [decisions], int; may be traced.

        The formats are gathered from one table, so the cost of it does not depend on how many
        options there are.
        """
        operands, decision_of, quantizers = self._quantizers()
        table = jax.tree.map(lambda *columns: np.stack(columns), *(q.fmt for q in quantizers))
        gathered = _gather(jax.tree.map(jnp.asarray, table), jnp.asarray(choices)[decision_of])
        chosen: dict[str, dict[str, Quantizer]] = {}
        for index, ((site, side), q) in enumerate(zip(operands, quantizers)):
            fmt = jax.tree.map(lambda column, i=index: column[i], gathered)
            chosen.setdefault(site, {})[side] = dataclasses.replace(q, fmt=fmt)
        return {
            name: SiteFormats(**chosen[name]) if name in chosen else self.fixed[name]
            for name in self.sites
        }

    def concrete_assignment(self, choices: Sequence[int]) -> dict[str, SiteFormats]:
        """As `assignment`, for known choices: plain Python numbers, None where nothing is done."""
        formats = dict(self.fixed)
        for decision, choice in zip(self.decisions, choices, strict=True):
            for name in decision.sites:
                formats[name] = site_formats(self.sites[name], decision.options[int(choice)])
        return {name: formats[name] for name in self.sites}

    def _quantizers(self) -> tuple[list[tuple[str, str]], np.ndarray, list[Quantizer]]:
        """Searched operands, the decision of each, and their options: formats [max_options]."""
        operands, decision_of, quantizers = [], [], []
        for number, decision in enumerate(self.decisions):
            for name in decision.sites:
                options = [site_formats(self.sites[name], option) for option in decision.options]
                for side in SiteFormats._fields:
                    column = [getattr(option, side) for option in options]
                    if any(spec is not None for spec in column):
                        column += [column[0]] * (self.max_options - len(column))
                        quantizers.append(_stacked(name, column))
                        operands.append((name, side))
                        decision_of.append(number)
        return operands, np.array(decision_of), quantizers

    def cost_table(self, cost: Callable[[Mapping[str, Site], Any], float]) -> CostTable:
        """Splits an additive cost, such as `cost.gbops`, into those of options and of the rest."""
        table = np.zeros((len(self.decisions), self.max_options))
        for number, decision in enumerate(self.decisions):
            sites = {name: self.sites[name] for name in decision.sites}
            for option, spec in enumerate(decision.options):
                formats = {name: site_formats(site, spec) for name, site in sites.items()}
                table[number, option] = cost(sites, formats)
        rest = {name: self.sites[name] for name in self.fixed}
        return CostTable(table, float(cost(rest, self.fixed)), self.mask)


@dataclasses.dataclass(frozen=True)
class CostTable:
    """An additive cost: `fixed + sum over decisions d of table[d, choices[d]]`."""

    table: np.ndarray  # [decisions, max_options], float64
    fixed: float
    mask: np.ndarray  # [decisions, max_options], bool

    def of(self, choices: jax.typing.ArrayLike) -> jax.Array:
        """The cost of `choices` [decisions]; float32 scalar, may be traced."""
        rows = jnp.asarray(self.table, jnp.float32)[np.arange(len(self.table)), choices]
        return self.fixed + jnp.sum(rows)

    def expected(self, probabilities: jax.Array) -> jax.Array:
        """The mean cost under independent `probabilities` [decisions, max_options]."""
        return self.fixed + jnp.sum(jnp.asarray(self.table, jnp.float32) * probabilities)

    @property
    def range(self) -> tuple[float, float]:
        """The costs of the cheapest and the dearest point of the space."""
        cheapest = np.where(self.mask, self.table, np.inf).min(axis=1).sum()
        dearest = np.where(self.mask, self.table, -np.inf).max(axis=1).sum()
        return self.fixed + float(cheapest), self.fixed + float(dearest)

    def check_target(self, target: float) -> None:
        """Raises SpaceError if no point of the space can cost `target`."""
        low, high = self.range
        if not low <= target <= high:
            raise SpaceError(
                f"The cost target {target:.6g} is outside of the space: its points cost between"
                f" {low:.6g} and {high:.6g}."
            )


def make_space(
    sites: Mapping[str, Site],
    rules: Iterable[tuple[str, FormatSpec | Sequence[FormatSpec]]],
    *,
    decide: str = "site",
) -> Space:
    """Builds a space from ordered rules: the first that matches a site's name holds for it.

    A rule's second part is either fixed formats, as in `rules.assign`, or a list or tuple of
    options to choose from:

        make_space(sites, [("stem|head", "int8"), (".*", ("int4", "int6", "int8", "bf16"))])

    Args:
      sites: as `find_sites` returns them.
      rules: pairs of pattern and formats or options. Sites that no rule matches are not quantized.
      decide: "site" for a decision per site, "rule" for one decision for all sites of a rule.

    Raises:
      RuleError: a rule matches no site or is never reached.
      FormatError: unknown format name.
      SiteError: a rule offers a format to a site that cannot be quantized.
      SpaceError: a rule has fewer than two options or the same twice, or options that differ in
        more than their format; no rule has options; `decide` is something else.
    """
    if decide not in ("site", "rule"):
        raise SpaceError(f"decide is {decide!r}; expected 'site' or 'rule'.")
    rules = [(pattern, spec) for pattern, spec in rules]
    searched = {i: tuple(s) for i, (_, s) in enumerate(rules) if _is_choice(s)}
    for number, options in searched.items():
        _check_options(rules[number][0], options)
    if not searched:
        raise SpaceError("The space has nothing to choose: give a rule a list of formats.")
    taken = match_rules(sites, [pattern for pattern, _ in rules])
    decisions = []
    for number, options in searched.items():
        pattern, members = rules[number][0], taken[number]
        if decide == "rule":
            decisions.append(Decision(pattern, tuple(members), options))
        else:
            decisions += [Decision(name, (name,), options) for name in members]
    order = {name: index for index, name in enumerate(sites)}
    decisions.sort(key=lambda decision: order[decision.sites[0]])
    for column in range(max(map(len, searched.values()))):  # checks every option
        chosen = {i: options[min(column, len(options) - 1)] for i, options in searched.items()}
        formats = assign(sites, [(p, chosen.get(i, s)) for i, (p, s) in enumerate(rules)])
    covered = {name for decision in decisions for name in decision.sites}
    fixed = {name: formats[name] for name in sites if name not in covered}
    space = Space(sites, tuple(decisions), fixed)
    space.assignment(np.zeros(len(decisions), int))  # raises where options cannot share a program
    return space


def _is_choice(spec: Any) -> bool:
    return isinstance(spec, (list, tuple)) and not isinstance(spec, (NumericFormat, SiteFormats))


def _check_options(pattern: str, options: Sequence[FormatSpec]) -> None:
    labels = [_label(option) for option in options]
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise SpaceError(
            f"Rule {pattern!r} offers {labels}: a choice needs at least two different formats."
        )
