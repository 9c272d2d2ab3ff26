"""A search space: the decisions to take, the formats each may choose, and what is fixed."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.architecture.decisions import ArchitectureDecision
from aqt_search.architecture.elastic import Elastic
from aqt_search.numerics.calibration import counts_elements
from aqt_search.numerics.formats import FormatError, NumericFormat, numeric_format
from aqt_search.numerics.outline import outline
from aqt_search.numerics.quantizer import Quantizer, quantizer, stack_quantizers
from aqt_search.search.cost_table import CostTable
from aqt_search.search.elastic_costs import FormatCosts, elastic_cost_table
from aqt_search.search.options import Choice, SpaceError, option_label, parsed_rule
from aqt_search.tracing.layers import layer_sites
from aqt_search.tracing.rules import (
    FormatSpec,
    assign,
    match_rules,
    rule_pairs,
    site_formats,
    with_named_layers,
)
from aqt_search.tracing.sites import GRADIENTS, Site, SiteFormats, is_unquantized

_UNQUANTIZED = numeric_format("fp32")  # an option of None: float32 rounds to itself

DECIDE = ("site", "block", "rule", "model", "stack")


@dataclasses.dataclass(frozen=True)
class Decision:
    """One thing to choose: the option taken holds for all its sites.

    With a role ("weight" or "activation") it chooses the formats of these operands alone, and
    another decision of the same group, or nothing, those of the others.
    """

    name: str
    sites: tuple[str, ...]
    options: tuple[FormatSpec, ...]
    role: str | None = None
    group: str = ""  # decisions of one group are about the same sites

    @property
    def labels(self) -> tuple[str, ...]:
        """The options' names, for tables and files."""
        return tuple(option_label(option) for option in self.options)

    def formats(self, site: Site, option: int) -> SiteFormats:
        """What an option does to one of the sites; None for operands it is not about."""
        spec = self.options[option]
        return site_formats(site, spec if self.role is None else {self.role: spec})


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


def _merged(formats: SiteFormats, over: SiteFormats) -> SiteFormats:
    """`formats`, with what `over` says in its place."""
    return SiteFormats(*(a if b is None else b for a, b in zip(formats, over)))


def _as_chosen(site: Site, formats: SiteFormats) -> SiteFormats:
    return formats


def _in_subnet(
    name: str, formats: SiteFormats, active: Mapping[str, jax.Array | None]
) -> SiteFormats:
    """Formats for a subnet: calibrations that count get what it has of "lhs", "rhs" and "out"."""

    def of(field: str, spec: NumericFormat | Quantizer | None):
        q = None if spec is None else quantizer(spec)
        if q is not None and q.calibration.centred:
            raise SpaceError(
                f"Site {name!r} has a grid without a zero ({field}: centred), so what a subnet has"
                " not would have values: expected a calibration that is not centred, beside"
                " architecture decisions."
            )
        if q is not None and _keeps_blocks(q):
            raise SpaceError(
                f"Site {name!r} learns or remembers scales of blocks ({field}), which cannot be cut"
                " for a subnet: expected one for each channel or for the tensor, beside"
                " architecture decisions."
            )
        if q is None or not counts_elements(q.calibration):
            return spec
        return dataclasses.replace(q, active=active.get("out" if field in GRADIENTS else field))

    return SiteFormats(*(of(field, spec) for field, spec in formats._asdict().items()))


def _keeps_blocks(q: Quantizer) -> bool:
    """Whether blocks have scales that stay from step to step."""
    in_blocks = q.granularity is not None and q.granularity.block_size is not None
    return in_blocks and bool(jax.tree.leaves(q.calibration.init((1,))))


class Point(NamedTuple):
    """Formats and an architecture: what a subnet is called with in place of an assignment."""

    assignment: dict[str, SiteFormats]
    architecture: jax.Array  # [architecture decisions], int


@dataclasses.dataclass(frozen=True)
class Space:
    """All decisions over a model's sites.

    A point of the space is an array `choices` [decisions] of option numbers; a policy holds one
    number per decision and option in arrays [decisions, max_options], with `mask` False where a
    decision has fewer options.
    """

    sites: Mapping[str, Site]
    decisions: tuple[Decision | ArchitectureDecision, ...]
    fixed: Mapping[str, SiteFormats]  # of sites that no decision, or one for a role only, covers
    # What is done to every site's formats, fixed and chosen: how scales are made, say.
    adapt: Callable[[Site, SiteFormats], SiteFormats] = _as_chosen
    # Of a space that decides about the architecture, too: its decisions are the first.
    net: Elastic | None = None

    def __hash__(self) -> int:
        return hash(tuple((d.name, d.sites, d.labels, d.role) for d in self.decisions))

    @property
    def max_options(self) -> int:
        """Options of the decision that has most."""
        return max(len(d.options) for d in self.decisions)

    @property
    def mask(self) -> np.ndarray:
        """[decisions, max_options], bool: which options exist."""
        return np.array([np.arange(self.max_options) < len(d.options) for d in self.decisions])

    @property
    def formats(self) -> tuple[NumericFormat, ...]:
        """All formats that are chosen among: fp32 stands for what an option leaves unquantized."""
        tables = [np.stack(list(q.fmt), 1).tolist() for q in self._quantizers()[2]]
        rows = dict.fromkeys(tuple(row) for table in tables for row in table)
        return tuple(
            NumericFormat(int(m), int(e), low, high, int(bits)) for m, e, low, high, bits in rows
        )

    @property
    def format_decisions(self) -> dict[int, Decision]:
        """The decisions that are about formats, by their number."""
        return {n: d for n, d in enumerate(self.decisions) if isinstance(d, Decision)}

    def assignment(self, choices: jax.typing.ArrayLike) -> dict[str, SiteFormats]:
        """The formats of every site under `choices` [decisions], int; may be traced.

        The formats are gathered from one table, so the cost of it does not depend on how many
        options there are.
        """
        operands, decision_of, quantizers = self._quantizers()
        if not operands:  # the architecture alone is decided
            return self._adapted({name: self._fixed(name) for name in self.sites})
        table = jax.tree.map(lambda *columns: np.stack(columns), *(q.fmt for q in quantizers))
        gathered = _gather(jax.tree.map(jnp.asarray, table), jnp.asarray(choices)[decision_of])
        chosen: dict[str, dict[str, Quantizer]] = {}
        for index, ((site, side), q) in enumerate(zip(operands, quantizers)):
            fmt = jax.tree.map(lambda column, i=index: column[i], gathered)
            chosen.setdefault(site, {})[side] = dataclasses.replace(q, fmt=fmt)
        return self._adapted(
            {name: self._fixed(name)._replace(**chosen.get(name, {})) for name in self.sites}
        )

    def architecture(self, choices: jax.typing.ArrayLike) -> jax.Array:
        """The choices [decisions] that are about the architecture: int [architecture decisions]."""
        return jnp.asarray(choices)[: 0 if self.net is None else len(self.net.decisions)]

    def point(self, choices: jax.typing.ArrayLike) -> Point | dict[str, SiteFormats]:
        """What a function of the whole model is called with: its assignment, or a `Point`.

        Calibrations that count elements are told which a subnet has (`Quantizer.active`).

        Raises:
          SpaceError: a grid has no zero, so the zeros of a subnet would have values.
        """
        assignment = self.assignment(choices)
        if self.net is None:
            return assignment
        architecture = self.architecture(choices)
        specs = (spec for formats in assignment.values() for spec in formats if spec is not None)
        counting = any(counts_elements(quantizer(spec).calibration) for spec in specs)
        active = self.net.active_elements(architecture) if counting else {}
        in_subnet = {
            name: _in_subnet(name, formats, active.get(self.sites[name].stack, {}))
            for name, formats in assignment.items()
        }
        return Point(in_subnet, architecture)

    def active(self, choices: jax.typing.ArrayLike) -> jax.Array:
        """Whether each decision decides anything, or is about what a subnet has not: [decisions].

        The depth of some blocks, and what is there under all depths, always does.
        """
        if self.net is None:
            return jnp.ones(len(self.decisions), bool)
        present = self.net.active(self.architecture(choices))
        return jnp.stack([self._any_present(d, present) for d in self.decisions])

    def _any_present(
        self, decision: Decision | ArchitectureDecision, present: Mapping[str, jax.Array]
    ) -> jax.Array:
        assert self.net is not None
        is_architecture = isinstance(decision, ArchitectureDecision)
        names = self.net.sites_of(decision) if is_architecture else decision.sites
        return jnp.any(jnp.stack([present[n] for n in names])) if names else jnp.bool_(True)

    def concrete_assignment(
        self, choices: Sequence[int] | np.ndarray | jax.Array
    ) -> dict[str, SiteFormats]:
        """As `assignment`, for known choices: plain Python numbers, None where nothing is done."""
        formats = {name: self._fixed(name) for name in self.sites}
        known = [int(choice) for _, choice in zip(self.decisions, choices, strict=True)]
        for number, decision in self.format_decisions.items():
            for name in decision.sites:
                chosen = decision.formats(self.sites[name], known[number])
                formats[name] = _merged(formats[name], chosen)
        return self._adapted(formats)

    def _adapted(self, formats: Mapping[str, SiteFormats]) -> dict[str, SiteFormats]:
        return {name: self.adapt(self.sites[name], f) for name, f in formats.items()}

    def _fixed(self, name: str) -> SiteFormats:
        return self.fixed.get(name, SiteFormats())

    def _quantizers(self) -> tuple[list[tuple[str, str]], np.ndarray, list[Quantizer]]:
        """Searched operands, the decision of each, and their options: formats [max_options]."""
        operands, decision_of, quantizers = [], [], []
        for number, decision in self.format_decisions.items():
            for name in decision.sites:
                found = [
                    decision.formats(self.sites[name], i) for i in range(len(decision.options))
                ]
                for side in SiteFormats._fields:
                    column = [getattr(formats, side) for formats in found]
                    if any(spec is not None for spec in column):
                        column += [column[0]] * (self.max_options - len(column))
                        quantizers.append(_stacked(name, column))
                        operands.append((name, side))
                        decision_of.append(number)
        return operands, np.array(decision_of), quantizers

    def cost_table(self, cost: Callable[[Mapping[str, Site], Any], float]) -> CostTable:
        """Tabulates a cost that is a sum over sites, such as `cost.gbops`.

        Raises:
          SpaceError: `cost` is no function; or the architecture is decided, too, and the cost is no
            sum over sites, or not finite.
        """
        if not callable(cost):
            raise SpaceError(
                f"cost is {cost!r}; expected a function of sites and an assignment, such as"
                " aqs.cost.gbops."
            )
        if self.net is not None:
            pair_of = {
                name: pair
                for pair in self._pairs()
                for number in pair
                for name in self.decisions[number].sites
            }
            return elastic_cost_table(
                self.net, self.mask, lambda name: self._formats_of(name, pair_of.get(name)), cost,
                self.concrete_assignment,
            )  # fmt: skip
        pairs = self._pairs()
        table = np.zeros((len(pairs), self.max_options, self.max_options))
        for group, (first, second) in enumerate(pairs):
            for i, j in self._options_of(first, second):
                table[group, i, j] = self._cost_of_pair(cost, (first, second), (i, j))
        covered = {name for decision in self.decisions for name in decision.sites}
        rest = {name: site for name, site in self.sites.items() if name not in covered}
        fixed = float(cost(rest, self._adapted({name: self._fixed(name) for name in rest})))
        firsts, seconds = np.array(pairs).T
        return CostTable(table, firsts, seconds, fixed, self.mask)

    def _pairs(self) -> list[tuple[int, int]]:
        """The one or two decisions about each group of sites."""
        groups: dict[str, list[int]] = {}
        for number, decision in enumerate(self.decisions):
            groups.setdefault(decision.group or decision.name, []).append(number)
        return [(members[0], members[-1]) for members in groups.values()]

    def _formats_of(self, name: str, pair: tuple[int, int] | None) -> FormatCosts:
        """The formats of one site under every pair of options about it."""
        if pair is None:
            return FormatCosts(None, [(0, 0)], [self._adapted_site(name, self._fixed(name))])
        options = list(self._options_of(*pair))
        found = []
        for chosen in options:
            formats = self._fixed(name)
            for number, option in dict(zip(pair, chosen)).items():
                decision = self.format_decisions[number]
                if name in decision.sites:
                    formats = _merged(formats, decision.formats(self.sites[name], option))
            found.append(self._adapted_site(name, formats))
        return FormatCosts(pair, options, found)

    def _adapted_site(self, name: str, formats: SiteFormats) -> dict[str, SiteFormats]:
        return {name: self.adapt(self.sites[name], formats)}

    def _options_of(self, first: int, second: int) -> Iterable[tuple[int, int]]:
        count = [len(self.decisions[d].options) for d in (first, second)]
        if first == second:
            return [(i, i) for i in range(count[0])]
        return [(i, j) for i in range(count[0]) for j in range(count[1])]

    def _cost_of_pair(self, cost: Callable, pair: tuple[int, int], options: tuple) -> float:
        names = dict.fromkeys(name for d in pair for name in self.decisions[d].sites)
        formats = {name: self._fixed(name) for name in names}
        for number, option in zip(pair, options):
            decision = self.format_decisions[number]
            for name in decision.sites:
                chosen = decision.formats(self.sites[name], option)
                formats[name] = _merged(formats[name], chosen)
        return cost({name: self.sites[name] for name in names}, self._adapted(formats))


def make_space(
    sites: Mapping[str, Site],
    rules: Iterable[tuple[str, Any]],
    *,
    decide: str = "site",
    net: Elastic | None = None,
) -> Space:
    """Builds a space from ordered rules: the first that matches a site's name holds for it.

    A rule's second part is either fixed formats, as in `rules.assign`, or options to choose from:
    a list or tuple, the name of one of `NAMED_OPTIONS`, or a mapping of "weight" and "activation"
    to such options or to a fixed format. In a mapping the two roles are decided apart.

        make_space(sites, [("stem|head", "int8"), (".*", ("int4", "int6", "int8", "bf16"))])
        make_space(sites, [(".*", "fliqs_l_fp")], decide="block")
        make_space(sites, [(".*", {"weight": ("int2", "int4"), "activation": "int8"})])

    With an elastic network its decisions come first: formats and architecture are chosen together
    (FLIQNAS, arXiv 2308.03290, section 4), or the architecture alone under fixed formats.

    Args:
      sites: as `find_sites` returns them.
      rules: pairs of pattern and formats or options. Sites that no rule matches are not quantized.
      decide: what shares a decision: "site" nothing, "block" the sites of a rule in one block of
        the network (the same first part of the name, where names begin alike the first that
        differs; inside of a part that holds numbered layers of several sites, each layer is one),
        "rule" all sites of a rule, "model" all sites, whose rules offer the same, "stack" the
        layers of a scan that are one site. For "site" and "block" a layer of a scan is a site of
        its own (`layer_sites`), so that a model has the decisions of its unrolled twin (but beside
        a `net`).
      net: the architecture decisions, of the model with these sites.

    Raises:
      RuleError: rules that are no pairs; one that matches no site or is never reached.
      FormatError: unknown format name.
      SiteError: a rule offers a format to a site that cannot be quantized.
      SpaceError: a rule has fewer than two options or the same twice, or options that differ in
        more than their format; no rule has options; options for a role that none of its sites has;
        decide "model" with rules that offer different options; `decide` is something else.
    """
    if decide not in DECIDE:
        raise SpaceError(f"decide is {decide!r}; expected one of {', '.join(DECIDE)}.")
    rules = [(pattern, parsed_rule(pattern, spec)) for pattern, spec in rule_pairs(rules)]
    searched = {i: spec for i, (_, spec) in enumerate(rules) if isinstance(spec, Choice)}
    if net is not None and sites.keys() != net.sites.keys():
        raise SpaceError(
            "The elastic network is of another model: its sites are not those of the space. Use"
            " `net.sites`."
        )
    if not searched and net is None:
        raise SpaceError("The space has nothing to choose: give a rule a list of formats.")
    patterns = [pattern for pattern, _ in rules]
    apart = decide in ("site", "block") and net is None
    sites = layer_sites(sites) if apart else with_named_layers(sites, patterns)
    taken = match_rules(sites, patterns)
    formats: dict[str, SiteFormats] = {}
    columns = [len(o) for choice in searched.values() for o in choice.options.values()]
    for column in range(max(columns, default=1)):
        chosen = {i: choice.spec(column) for i, choice in searched.items()}  # checks every option
        formats = assign(sites, [(p, chosen.get(i, s)) for i, (p, s) in enumerate(rules)])
    decisions = []
    groups = _groups(sites, rules, taken, searched, decide) if searched else []
    for group, members, number in groups:
        decisions += _decisions(sites, rules[number][0], group, members, searched[number])
    order = {name: index for index, name in enumerate(sites)}
    decisions.sort(key=lambda decision: order[decision.sites[0]])
    covered = {name for number in searched for name in taken[number]}
    fixed = {name: formats[name] for name in sites if name not in covered}
    for number, choice in searched.items():
        if choice.fixed:
            fixed |= {name: site_formats(sites[name], choice.fixed) for name in taken[number]}
    architecture = () if net is None else net.decisions
    space = Space(sites, (*architecture, *decisions), fixed, net=net)
    space.assignment(
        np.zeros(len(space.decisions), int)
    )  # raises where options cannot share a program
    return space


def _groups(sites, rules, taken, searched, decide) -> list[tuple[str, list[str], int]]:
    """(name, sites, rule) of everything that is decided together."""
    if decide == "model":
        offers = {rules[i][0]: str(choice) for i, choice in searched.items()}
        if len(set(offers.values())) > 1:
            raise SpaceError(
                "One decision for the model needs one list of options, but the rules"
                f" {', '.join(map(repr, offers))} offer different ones."
            )
        members = {name for number in searched for name in taken[number]}
        return [("model", [name for name in sites if name in members], next(iter(searched)))]
    groups = []
    for number in searched:
        if decide == "rule":
            groups.append((rules[number][0], taken[number], number))
            continue
        names = _blocks(sites, taken[number]) if decide == "block" else taken[number]
        for key in dict.fromkeys(names):
            groups.append((key, [s for s, n in zip(taken[number], names) if n == key], number))
    repeated = {key for key, _, _ in groups if sum(key == other for other, _, _ in groups) > 1}
    return [(f"{k} ({rules[i][0]})" if k in repeated else k, s, i) for k, s, i in groups]


def _blocks(sites: Mapping[str, Site], members: Iterable[str]) -> list[str]:
    """The block of every member: its layer if there are layers, else the first part that differs.

    Layers are parts of the network with several sites each, whose names differ in a number only.
    """
    parts_of = _parts(sites)
    parts = list(parts_of.values())
    depth = _common(parts)
    layers = _layers(parts)

    def block(name: str) -> str:
        own = parts_of[name]
        ends = (end for end in range(depth + 1, len(own)) if tuple(own[:end]) in layers)
        return "/".join(own[: next(ends, depth + 1)])

    return [block(name) for name in members]


def _common(parts: Sequence[Sequence[str]]) -> int:
    """How many first parts all names share, their last ones left out."""
    depth = 0
    while all(len(p) > depth + 1 for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    return depth


def _parts(sites: Mapping[str, Site]) -> dict[str, list[str]]:
    """The parts of names; a layer's number stands where its scan's sites part: `blocks[3]/mlp`."""
    parts = {name: site.stack.split("/") for name, site in sites.items()}
    scans: dict[Any, list[str]] = {}
    for name, site in sites.items():
        for depth in range(1, len(site.layer) + 1):
            scans.setdefault(site.layers[:depth], []).append(name)
    ends = {scan: _common([parts[name] for name in names]) for scan, names in scans.items()}
    return {
        name: _numbered(
            parts[name], [ends[site.layers[: d + 1]] for d in range(len(site.layer))], site
        )
        for name, site in sites.items()
    }


def _numbered(parts: Sequence[str], ends: Sequence[int], site: Site) -> list[str]:
    found = list(parts)
    for end, number in zip(ends, site.layer):
        found[max(end - 1, 0)] += f"[{number}]"
    return found


def _layers(parts: Iterable[Sequence[str]]) -> set[tuple[str, ...]]:
    """Prefixes that several names share and that have others beside them, but for a number."""
    counts = collections.Counter(tuple(p[:end]) for p in parts for end in range(1, len(p)))
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for prefix, count in counts.items():
        stem = re.sub(r"\d+\]?$", "", prefix[-1])
        if count > 1 and stem != prefix[-1]:
            alike.setdefault((*prefix[:-1], stem), []).append(prefix)
    return {prefix for family in alike.values() if len(family) > 1 for prefix in family}


def _decisions(sites, pattern: str, group: str, members: list[str], choice: Choice) -> list:
    """The decisions about one group: one, or one for each role its sites have."""
    if None in choice.options:
        return [Decision(group, tuple(members), choice.options[None], None, group)]
    found = []
    of_roles = {role: options for role, options in choice.options.items() if role is not None}
    for role, options in of_roles.items():
        # The product of two activations has no weight to decide about.
        has = [n for n in members if not is_unquantized(site_formats(sites[n], {role: "int8"}))]
        if has:
            found.append(Decision(f"{group}:{role}", tuple(has), options, role, group))
    if not found:
        raise SpaceError(
            f"Rule {pattern!r} decides nothing for {members}: none has a"
            f" {' or '.join(of_roles)} to quantize."
        )
    return found


def searched_operands(space: Space) -> dict[tuple[str, str], int]:
    """The operands (site, side) that a space chooses formats of, and the decision about each."""
    operands, decision_of, _ = space._quantizers()
    return dict(zip(operands, decision_of.tolist()))
