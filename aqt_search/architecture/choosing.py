"""From what a user writes, regexes and options, to decisions and what they do to a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from aqt_search.architecture.channel_groups import ChannelGroup, Channels
from aqt_search.architecture.decisions import ArchitectureDecision, Factor, Factors, Times
from aqt_search.architecture.depth import checked_blocks, leaves_of, skipped_sites
from aqt_search.architecture.errors import ArchitectureError


@dataclasses.dataclass
class Chosen:
    """Decisions, while they are collected, and what each does."""

    decisions: list[ArchitectureDecision] = dataclasses.field(default_factory=list)
    widths: dict[str, Factors] = dataclasses.field(default_factory=dict)  # of groups: channels
    windows: dict[str, Factors] = dataclasses.field(default_factory=dict)  # of sites: taps
    skipped: dict[str, tuple[Factors, ...]] = dataclasses.field(default_factory=dict)  # of sites
    absent: dict[str, tuple[Factors, ...]] = dataclasses.field(default_factory=dict)  # of leaves

    def add(self, decision: ArchitectureDecision) -> int:
        """The number of a decision."""
        self.decisions.append(decision)
        return len(self.decisions) - 1


# --- Widths ---------------------------------------------------------------------------------------


def chosen_widths(
    channels: Channels, widths: Mapping[str | tuple[str, ...], Sequence[Any] | Times], into: Chosen
) -> None:
    """Adds a decision for every group that a regex matches, or one for the groups of several."""
    _check_mapping("widths", widths)
    for key, options in widths.items():
        if isinstance(options, Times):  # after what it is a multiple of
            continue
        options = _several(key, options)
        if isinstance(key, str):
            for group in _matched(channels.groups, key):
                _width(channels.groups, (group,), [(option,) for option in options], into)
        else:
            _check_tuples(key, options)
            groups = tuple(_one(channels.groups, pattern) for pattern in key)
            _width(channels.groups, groups, options, into)
    for key, options in widths.items():
        if isinstance(options, Times):
            for pattern in key if isinstance(key, tuple) else (key,):
                for group in _matched(channels.groups, pattern):
                    _expansion(channels.groups, group, options, into)


def _width(
    groups: Mapping[str, ChannelGroup], names: tuple[str, ...], options: Sequence, into: Chosen
) -> None:
    options = [tuple(option) for option in options]
    if len(set(names)) < len(names):
        raise ArchitectureError(
            f"Several regular expressions of one entry of `widths` match {names[0]!r}; expected a"
            " group of channels for each."
        )
    for number, name in enumerate(names):
        _check_free(groups[name], into)
        _check_widths(groups[name], [option[number] for option in options])
    _check_distinct(names[0], options)
    labels = [option[0] if len(names) == 1 else option for option in options]
    decision = into.add(ArchitectureDecision(f"{names[0]}:width", "width", tuple(labels), names))
    for number, name in enumerate(names):
        column = np.array([option[number] for option in options])
        into.widths[name] = (Factor(decision, column),)


def _expansion(groups: Mapping[str, ChannelGroup], name: str, times: Times, into: Chosen) -> None:
    _check_free(groups[name], into)
    times = Times(times.of, _several(name, times.ratios))
    of = _one(groups, times.of)
    base = into.widths.get(of)
    largest = groups[of].size if base is None else max(_values(base))
    _check_widths(groups[name], [largest * ratio for ratio in times.ratios])
    _check_distinct(name, times.ratios)
    kind = ArchitectureDecision(f"{name}:expansion", "expansion", tuple(times.ratios), (name,))
    decision = into.add(kind)
    scale = groups[of].size if base is None else 1
    own = Factor(decision, np.array(times.ratios) * scale)
    into.widths[name] = (*(base or ()), own)


def _values(factors: Factors) -> np.ndarray:
    """All values that the product of factors can have."""
    values = np.ones(1, int)
    for factor in factors:
        values = np.outer(values, factor.of_option).reshape(-1)
    return values


def _several(key: Any, options: Any) -> tuple[Any, ...]:
    is_several = isinstance(options, (Sequence, np.ndarray)) and not isinstance(options, str)
    if not is_several or any(isinstance(option, bool) for option in options):
        raise ArchitectureError(
            f"The options of {key!r} are {options!r}; expected several, such as (16, 32)."
        )
    return tuple(o.item() if isinstance(o, np.integer) else o for o in options)


def _check_mapping(name: str, choices: Any) -> None:
    if not isinstance(choices, Mapping):
        raise ArchitectureError(
            f"{name} is {choices!r}; expected options by regular expression, such as"
            f" {{'^block2/': (3, 5)}}."
        )


def _check_tuples(key: Any, options: Sequence[Any]) -> None:
    """Raises where the groups of several regexes have not a number each."""
    if not isinstance(key, tuple) or not key:
        raise ArchitectureError(
            f"{key!r} is no key of `widths`; expected a regular expression or a tuple of several."
        )
    for option in options:
        if not isinstance(option, Sequence) or len(option) != len(key):
            raise ArchitectureError(
                f"{option!r} is no option of {key!r}; expected {len(key)} numbers of channels, one"
                " for each regular expression."
            )


def _check_free(group: ChannelGroup, chosen: Chosen) -> None:
    if group.refused is not None:
        raise ArchitectureError(
            f"The channels of {group.name!r} cannot be cut: {group.refused}. They are axes of"
            f" {', '.join(f'{leaf} ({axis})' for leaf, axis in group.axes[:4])}. Leave this group"
            " out of `widths`; channel_groups tells which can be cut."
        )
    if group.name in chosen.widths:
        raise ArchitectureError(
            f"Two entries of `widths` decide about the channels of {group.name!r}; expected one."
        )


def _check_widths(group: ChannelGroup, widths: Sequence[Any]) -> None:
    for width in widths:
        if not isinstance(width, (int, np.integer)) or not 1 <= width <= group.size:
            raise ArchitectureError(
                f"{group.name!r} cannot have {width!r} channels: the model has {group.size} there;"
                f" expected whole numbers from 1 to {group.size}. Build the model as wide as its"
                " widest subnet."
            )


def _check_distinct(name: str, options: Sequence[Any]) -> None:
    if len(options) < 2 or len(set(options)) < len(options):
        raise ArchitectureError(
            f"The options of {name!r} are {tuple(options)!r}; expected two or more, all different."
        )


# --- Kernels --------------------------------------------------------------------------------------


def chosen_kernels(channels: Channels, kernels: Mapping[str, Sequence[int]], into: Chosen) -> None:
    """Adds a decision about the window of every convolution that a regex matches."""
    _check_mapping("kernels", kernels)
    convolutions = {
        name: site
        for name, site in channels.graph.sites.items()
        if site.kind == "conv_general_dilated" and site.weight is site.rhs
    }
    for pattern, options in kernels.items():
        options = _several(pattern, options)
        for name in _matched(convolutions, pattern):
            size = _window(channels, name, pattern)
            wrong = [k for k in options if not (isinstance(k, int) and 1 <= k <= size)]
            if wrong or any((size - k) % 2 for k in options):
                raise ArchitectureError(
                    f"Site {name!r}, which {pattern!r} matches, cannot have windows of {options!r}:"
                    f" its kernel is {size} x {size}; expected sizes from 1 to {size} whose"
                    " difference to it is even, so that they have the same middle. Build the model"
                    " with its largest window, or say more of the names of the convolutions that"
                    " are meant."
                )
            if name in into.windows:
                raise ArchitectureError(f"Two entries of `kernels` decide about {name!r}.")
            _check_distinct(name, options)
            decision = ArchitectureDecision(f"{name}:window", "window", options, (name,))
            into.windows[name] = (Factor(into.add(decision), np.array(options)),)


def _window(channels: Channels, name: str, pattern: str) -> int:
    """The size of a square window."""
    shape = channels.graph.sites[name].rhs.shape
    window = [shape[axis] for axis in channels.window_axes(name)]
    named = [channels.size_of(leaf, axis) for leaf, axis in channels.taps(name)]
    if (window != named and set(window) != {1}) or len(set(window)) != 1:
        what = "" if window == named else ", made of parameters and no parameter itself"
        raise ArchitectureError(
            f"Site {name!r}, which {pattern!r} matches, cannot change its window: its kernel is"
            f" {' x '.join(map(str, window))}{what}; expected a square one that is a parameter. Say"
            " more of the names of the convolutions that are meant."
        )
    return window[0]


# --- Depths ---------------------------------------------------------------------------------------


def chosen_depths(
    channels: Channels, depths: Iterable[tuple[Sequence[str], Sequence[int]]], into: Chosen
) -> None:
    """Adds a decision about how many of some blocks, from the first, a subnet has."""
    decided: set[str] = set()
    for blocks, options in _pairs(depths):
        checked_blocks(blocks, options)
        if twice := sorted(decided.intersection(blocks)):
            raise ArchitectureError(f"Two entries of `depths` decide about {twice[0]!r}.")
        decided.update(blocks)
        about, ends = tuple(blocks), dict.fromkeys((blocks[0], blocks[-1]))
        kind = ArchitectureDecision(f"{'..'.join(ends)}:depth", "depth", tuple(options), about)
        decision = into.add(kind)
        for place, block in enumerate(blocks):
            if place < min(options):
                continue
            gate = (Factor(decision, np.array([int(depth > place) for depth in options])),)
            for leaf in leaves_of(channels.graph, block).values():
                into.absent[leaf] = (*into.absent.get(leaf, ()), gate)
            for site in skipped_sites(channels.graph, block):
                into.skipped[site] = (*into.skipped.get(site, ()), gate)


def _pairs(depths: Any) -> list[tuple[Any, Any]]:
    if isinstance(depths, Iterable):
        depths = list(depths)
        if all(isinstance(entry, Sequence) and len(entry) == 2 for entry in depths):
            return depths
    raise ArchitectureError(
        f"depths is {depths!r}; expected pairs of blocks and numbers of blocks, such as"
        " [(('block3', 'block4'), (0, 1, 2))]."
    )


# --- Names ----------------------------------------------------------------------------------------


def _matched(names: Mapping[str, Any], pattern: str) -> list[str]:
    if not isinstance(pattern, str):
        raise ArchitectureError(f"{pattern!r} is no regular expression: expected a text.")
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ArchitectureError(f"{pattern!r} is not a regular expression: {error}.") from error
    if not found:
        raise ArchitectureError(
            f"{pattern!r} matches none of {', '.join(names)}; expected a regular expression that is"
            " found in the name of a group of channels (widths) or of a convolution (kernels)."
            if names
            else f"{pattern!r} matches nothing: the model has no group of channels that are axes of"
            " parameters (widths), or no convolution (kernels)."
        )
    return found


def _one(names: Mapping[str, Any], pattern: str) -> str:
    found = _matched(names, pattern)
    if len(found) > 1:
        raise ArchitectureError(
            f"{pattern!r} matches {', '.join(found)}; expected one group. Say more of its name."
        )
    return found[0]
