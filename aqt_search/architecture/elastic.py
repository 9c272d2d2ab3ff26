"""Elastic networks: every subnet of a model is the same model with masked variables.

    net = elastic(apply, variables, images, widths={"expand": (48, 96)},
                  kernels={"depthwise": (3, 5)}, depths=[(("block3", "block4"), (0, 1, 2))])
    logits = apply(net.variables(choices, variables), images)      # `choices` may be traced

One compiled program serves all subnets; `jax.vmap` over choices evaluates many, and each replica
under pmap can have its own. A subnet equals the model that is built without the channels, taps and
blocks, to the order of sums (`net.extract` cuts its variables out); gradients of what it lacks are
exactly 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.architecture.channel_groups import Channels
from aqt_search.architecture.choosing import Chosen, chosen_depths, chosen_kernels, chosen_widths
from aqt_search.architecture.decisions import ArchitectureDecision, Factors, Times, value_under
from aqt_search.architecture.errors import ArchitectureError
from aqt_search.architecture.kernel_matrices import Matrices, chosen_kernel, identity_matrices
from aqt_search.architecture.leaf_masks import LeafMask
from aqt_search.tracing.flat_graph import trace_graph
from aqt_search.tracing.sites import Site, parameter_name


def elastic(
    apply: Callable,
    variables: Any,
    *args: Any,
    widths: Mapping[str | tuple[str, ...], Sequence[Any] | Times] | None = None,
    kernels: Mapping[str, Sequence[int]] | None = None,
    depths: Sequence[tuple[Sequence[str], Sequence[int]]] = (),
) -> Elastic:
    """The subnets of `apply(variables, *args)` under architecture decisions; computes nothing.

    Args:
      apply: a function of variables and data, in evaluation mode.
      variables: its first argument, of the largest subnet; may be abstract, as the data may.
      *args: the data; use a batch of one, so that costs are of an example.
      widths: by regexes of names of channel groups, the numbers of channels to choose from, or
        `Times` another group's. Each group that a regex matches is decided on its own; a key of
        several regexes, each of one group, decides about these together by options of one number
        each: `{("block4/expand", "block4/squeeze"): ((48, 16), (72, 24))}`.
      kernels: by regexes of names of convolutions, the windows to choose from.
      depths: blocks in their order and how many of them, from the first, to choose from. A block is
        named by the first part of the names of its parameters.

    Raises:
      ArchitectureError: what is to be chosen is not there, or cannot be cut out of the model: the
        site and the reason are named.
      SiteError: `apply` names a mapped axis that is not bound.
    """
    channels, chosen = Channels(trace_graph(apply, variables, *args)), Chosen()
    chosen_widths(channels, widths or {}, chosen)
    chosen_kernels(channels, kernels or {}, chosen)
    chosen_depths(channels, depths, chosen)
    if not chosen.decisions:
        raise ArchitectureError(
            "There is nothing to choose: give `widths`, `kernels` or `depths`. channel_groups lists"
            " the channels that can be cut."
        )
    return Elastic(
        channels.graph.sites, channels, tuple(chosen.decisions), _leaf_masks(channels, chosen),
        chosen.widths, chosen.windows, chosen.skipped,
    )  # fmt: skip


def _leaf_masks(channels: Channels, chosen: Chosen) -> dict[str, LeafMask]:
    masks: dict[str, LeafMask] = {}

    def of(leaf: str) -> LeafMask:
        return masks.get(leaf, LeafMask(channels.shape_of(leaf), (), (), ()))

    for group, factors in chosen.widths.items():
        for leaf, axis in channels.groups[group].axes:
            mask = of(leaf)
            masks[leaf] = dataclasses.replace(mask, widths=(*mask.widths, (axis, factors)))
    for site, factors in chosen.windows.items():
        taps = channels.taps(site)
        leaf, axes = taps[0][0], tuple(axis for _, axis in taps)
        mask = of(leaf)
        masks[leaf] = dataclasses.replace(mask, windows=(*mask.windows, (axes, factors)))
    for leaf, gates in chosen.absent.items():
        masks[leaf] = dataclasses.replace(of(leaf), present=gates)
    return masks


@dataclasses.dataclass(frozen=True)
class Elastic:
    """A model with architecture decisions; `elastic` makes one.

    A point is an array `choices` [decisions] of option numbers, as for a `Space`.

    Attributes:
      sites: of the whole model.
      channels: its channel groups.
      decisions: what there is to choose.
      leaf_masks: by name of a leaf, which of its elements subnets have.
      widths: by channel group, how many channels subnets have of it.
      windows: by site, the taps along each axis of its window.
      gates: by site, whether it is there at all.
    """

    sites: Mapping[str, Site]
    channels: Channels = dataclasses.field(repr=False)
    decisions: tuple[ArchitectureDecision, ...]
    leaf_masks: Mapping[str, LeafMask] = dataclasses.field(repr=False)
    widths: Mapping[str, Factors] = dataclasses.field(repr=False)
    windows: Mapping[str, Factors] = dataclasses.field(repr=False)
    gates: Mapping[str, tuple[Factors, ...]] = dataclasses.field(repr=False)

    @property
    def largest(self) -> np.ndarray:
        """The whole model as far as the decisions go: of each the largest option."""
        return np.array([_argmost(d.options, max) for d in self.decisions])

    @property
    def smallest(self) -> np.ndarray:
        """Of each decision the smallest option."""
        return np.array([_argmost(d.options, min) for d in self.decisions])

    def variables(
        self, choices: jax.typing.ArrayLike, variables: Any, matrices: Matrices | None = None
    ) -> Any:
        """The variables of a subnet: 0 where it has no channel, tap or block.

        Args:
          choices: int [decisions]; may be traced, and are not checked then: as by all indexing in
            JAX a number above the last option is the last, and negative ones count from the end.
          variables: of the whole model.
          matrices: what makes smaller windows of larger ones, as of `matrices`; None: their middle.
        """
        choices = self._checked(choices)
        self._check_whole(variables)

        def masked(path, leaf):
            name = parameter_name(path)
            if name not in self.leaf_masks:
                return leaf
            mask = self.leaf_masks[name]
            if matrices is not None and name in matrices:
                leaf = chosen_kernel(leaf, mask, matrices[name], choices)
            here = mask.mask(choices)
            return leaf if here is None else jnp.where(here, leaf, jnp.zeros((), leaf.dtype))

        return jax.tree_util.tree_map_with_path(masked, variables)

    def matrices(self) -> dict[str, tuple[jax.Array, ...]]:
        """The kernel matrices that training starts from, by leaf: the identity for each window.

        They are parameters like any other, learned beside the variables.
        """
        return identity_matrices(self.leaf_masks)

    def masks(self, choices: jax.typing.ArrayLike, tree: Any) -> Any:
        """1 where a subnet has an element of the variables `tree`, else 0; float32, broadcasts."""
        choices = self._checked(choices)

        def of(path, leaf):
            mask = self._mask(path, choices)
            return jnp.ones((), jnp.float32) if mask is None else mask.astype(jnp.float32)

        return jax.tree_util.tree_map_with_path(of, tree)

    def sites_of(self, decision: ArchitectureDecision) -> tuple[str, ...]:
        """The sites that a decision is about, one of which has to be there for it to decide."""
        if decision.kind == "depth":
            return ()
        about = set(decision.about)
        return tuple(
            name
            for name in self.sites
            if name in about or any(loop.group in about for loop in self.channels.of_site(name))
        )

    def active(self, choices: jax.typing.ArrayLike) -> dict[str, jax.Array]:
        """Whether a subnet has each of the sites: bool, []."""
        choices = self._checked(choices)
        return {
            name: jnp.all(jnp.stack([value_under(f, choices) > 0 for f in self.gates[name]]))
            if name in self.gates
            else jnp.bool_(True)
            for name in self.sites
        }

    def active_elements(
        self, choices: jax.typing.ArrayLike
    ) -> dict[str, dict[str, jax.Array | None]]:
        """What a subnet has of the operands and the result of each site, for `Quantizer.active`.

        By site and by "lhs", "rhs" and "out" a mask: bool, of the array's rank, which broadcasts to
        it; None where every subnet has all of it. Of a site that a subnet has not nothing is.
        """
        choices = self._checked(choices)
        sides = ("lhs", "rhs", "out")
        return {
            name: {side: self._active_in(name, side, choices) for side in sides}
            for name in self.sites
        }

    def _active_in(self, name: str, side: str, choices: jax.Array) -> jax.Array | None:
        site = self.sites[name]
        shape = site.out_shape if side == "out" else getattr(site, side).shape
        widths = tuple((axis, self.widths[group]) for axis, group in self.groups_of(name, side))
        has_window = side == "rhs" and name in self.windows
        windows = ((self.channels.window_axes(name), self.windows[name]),) if has_window else ()
        mask = LeafMask(shape, widths, windows, self.gates.get(name, ())).mask(choices)
        # Whether a site is there is one number.
        return mask if mask is None or mask.ndim else jnp.broadcast_to(mask, (1,) * len(shape))

    def groups_of(self, name: str, side: str) -> list[tuple[int, str]]:
        """The axes of a site's "lhs", "rhs" or "out" that are decided about, and their groups."""
        node = self.channels.graph.site_nodes().get(name)
        if node is None:
            return []
        values = dict(zip(self.sites[name].equation_sides, node.inputs)) | {"out": node.outputs[0]}
        shape = self.channels.graph.shape(values[side])
        found = ((axis, self.channels.group_of(values[side], axis)) for axis in range(len(shape)))
        return [(axis, group) for axis, group in found if group in self.widths]

    def where(self, choices: jax.typing.ArrayLike, new: Any, old: Any) -> Any:
        """`new` variables where a subnet has them, `old` ones elsewhere.

        For what is kept beside the weights, such as running statistics and momenta: a channel that
        a step did not have told it nothing.
        """
        choices = self._checked(choices)

        def select(path, new, old):
            mask = self._mask(path, choices)
            return new if mask is None else jnp.where(mask, new, old)

        return jax.tree_util.tree_map_with_path(select, new, old)

    def _mask(self, path, choices: jax.Array) -> jax.Array | None:
        found = self.leaf_masks.get(parameter_name(path))
        return None if found is None else found.mask(choices)

    def _known(self, choices: jax.typing.ArrayLike) -> np.ndarray:
        """Known choices, also where a function is traced."""
        if isinstance(choices, jax.core.Tracer):
            raise ArchitectureError(
                "choices are traced, but a subnet is cut out by known ones: its shapes depend on"
                " them. Call this outside of jit, or mask by `variables`."
            )
        self._checked(choices)
        return np.asarray(choices)

    def _checked(self, choices: jax.typing.ArrayLike) -> jax.Array:
        choices = jnp.asarray(choices)
        if choices.shape != (len(self.decisions),):
            raise ArchitectureError(
                f"choices have shape {choices.shape}; expected one option number for each of the"
                f" {len(self.decisions)} decisions. For many architectures use jax.vmap."
            )
        if not jnp.issubdtype(choices.dtype, jnp.integer):
            raise ArchitectureError(
                f"choices are {choices.dtype}; expected numbers of options, int."
            )
        if not isinstance(choices, jax.core.Tracer):
            self._check_options(np.asarray(choices).tolist())
        return choices

    def _check_options(self, choices: Sequence[int]) -> None:
        for decision, choice in zip(self.decisions, choices):
            if not 0 <= choice < len(decision.options):
                raise ArchitectureError(
                    f"The choice of {decision.name!r} is {choice}; expected the number of one of"
                    f" its {len(decision.options)} options, 0 to {len(decision.options) - 1}."
                )

    def _check_whole(self, variables: Any) -> None:
        """Raises for what has been cut already, or is of another model."""
        leaves = _leaves(variables)
        if self.leaf_masks.keys().isdisjoint(name for name, _ in leaves):
            raise ArchitectureError(
                f"The variables have no {next(iter(self.leaf_masks))!r}, nor anything else that is"
                " decided about: give them as the model takes them."
            )
        for name, leaf in leaves:
            mask = self.leaf_masks.get(name)
            if mask is not None and np.shape(leaf) != mask.shape:
                raise ArchitectureError(
                    f"{name!r} has shape {np.shape(leaf)}; expected {mask.shape}, that of the whole"
                    " model. Give its variables, not those of a subnet that was cut out of it."
                )

    def extract(
        self, choices: jax.typing.ArrayLike, variables: Any, matrices: Matrices | None = None
    ) -> Any:
        """The variables of a subnet, cut out: those of the model that is built like it.

        Leaves of skipped blocks are left out, and dictionaries that are empty then.

        Args:
          choices: int [decisions], known numbers.
          variables: of the whole model; may be traced.
          matrices: as of `variables`.
        """
        known = self._known(choices)
        self._check_whole(variables)

        def cut(path, leaf):
            name = parameter_name(path)
            mask = self.leaf_masks.get(name)
            if mask is not None and matrices is not None and name in matrices:
                leaf = chosen_kernel(leaf, mask, matrices[name], jnp.asarray(known))
            return leaf if mask is None else mask.cut(leaf, known)

        return _pruned(jax.tree_util.tree_map_with_path(cut, variables))

    def description(self, choices: jax.typing.ArrayLike) -> dict[str, Any]:
        """What a subnet has, by decision: {"block2/expand/kernel:width": 48, ...}."""
        known = self._known(choices)
        return {d.name: d.options[int(c)] for d, c in zip(self.decisions, known)}

    def sort(self, variables: Any, by: Any = None) -> Any:
        """The whole model with its channels in the order of their importance: the same function.

        Importance is the sum of |w| over what reads a channel. Narrow subnets, which keep the first
        channels, then keep those that matter most (Cai et al. 2020, arXiv 1908.09791, section 3.3).

        Args:
          variables: of the whole model, concrete.
          by: variables whose weights are important, where `variables` are others of the same
            shapes, such as their momentum; by default `variables`.
        """
        leaves, tree = self._named(variables), jax.tree.structure(variables)
        weights = leaves if by is None else self._named(by)
        orders = {
            group: np.argsort(-self._importance(group, weights), kind="stable")
            for group in self.widths
        }
        for group, order in orders.items():
            for name, axis in self.channels.groups[group].axes:
                leaves[name] = np.take(leaves[name], order, axis)
        return jax.tree.unflatten(tree, [jnp.asarray(leaf) for leaf in leaves.values()])

    def _named(self, variables: Any) -> dict[str, np.ndarray]:
        """All leaves of the whole model by name, in the order of the tree."""
        self._check_whole(variables)
        leaves = {name: np.asarray(leaf) for name, leaf in _leaves(variables)}
        axes = (axis for group in self.widths for axis in self.channels.groups[group].axes)
        missing = [name for name, _ in axes if name not in leaves]
        if missing:
            raise ArchitectureError(
                f"The variables have no {missing[0]!r}, whose channels are sorted: give all of the"
                " whole model's."
            )
        return leaves

    def _importance(self, group: str, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """[channels], float64."""
        total = np.zeros(self.channels.groups[group].size)
        read = self.channels.reading(group) or self.channels.groups[group].axes
        for name, axis in read:
            others = tuple(a for a in range(leaves[name].ndim) if a != axis)
            total += np.abs(leaves[name].astype(np.float64)).sum(others)
        return total


def _leaves(variables: Any) -> list[tuple[str, Any]]:
    """Names and leaves, in the order of the tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(variables)
    return [(parameter_name(path), leaf) for path, leaf in flat]


def _argmost(options: Sequence[Any], most: Callable) -> int:
    return list(options).index(most(options))


def _pruned(tree: Any) -> Any:
    """The tree without what is None in its dictionaries, and without those that are empty then."""
    if not isinstance(tree, Mapping):
        return tree
    parts = {key: _pruned(part) for key, part in tree.items()}
    kept = {key: part for key, part in parts.items() if part is not None}
    return kept if kept or not tree else None
