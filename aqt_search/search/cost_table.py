"""The cost of every point of a space, tabulated, so that a search step only looks it up."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.search.options import SpaceError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CostTable:
    """A cost that adds up over groups of sites with one or two decisions each.

        cost(c) = fixed + sum over groups g of table[g, c[first[g]], c[second[g]]]

    A group whose formats one decision chooses has first = second, and uses the diagonal alone. One
    whose weights and activations are chosen apart has two: MACs * bits * bits is no sum over them.
    Every decision belongs to one group.

    Where the architecture is decided, too, the terms are those of single sites, each times a share
    for each of the decisions about its widths, window and depth:

        table[g, c[first[g]], c[second[g]]] * product over f of shares[g, f, c[sharing[g, f]]]

    No decision is in a term twice, so the mean under independent decisions is exact.
    """

    table: np.ndarray  # [groups, max_options, max_options], float64
    first: np.ndarray  # [groups], int: a decision
    second: np.ndarray  # [groups], int: the other decision, or the same
    fixed: float
    mask: np.ndarray  # [decisions, max_options], bool
    shares: np.ndarray | None = None  # [groups, factors, max_options], float64
    sharing: np.ndarray | None = None  # [groups, factors], int: a decision; shares of 1 fill up

    def of(self, choices: jax.typing.ArrayLike) -> jax.Array:
        """The cost of `choices` [decisions]; float32 scalar, may be traced."""
        choices = jnp.asarray(choices)
        table = jnp.asarray(self.table, jnp.float32)
        terms = table[np.arange(len(self.table)), choices[self.first], choices[self.second]]
        if self.shares is not None:
            terms = terms * self._share(jnp.asarray(self.shares, jnp.float32), choices)
        return self.fixed + jnp.sum(terms)

    def of_many(self, choices: np.ndarray) -> np.ndarray:
        """The costs of `choices` [n, decisions], known numbers; float64 [n]."""
        choices = np.asarray(choices)
        groups = np.arange(len(self.table))
        terms = self.table[groups, choices[:, self.first], choices[:, self.second]]
        if self.shares is not None:
            terms = terms * self.shares_of(choices)
        return self.fixed + terms.sum(axis=1)

    def shares_of(self, choices: np.ndarray) -> np.ndarray:
        """The products of every term's shares under known `choices` [n, decisions]: [n, groups]."""
        return self._share(self.shares, choices)

    def _share(self, shares, choices):
        """The product of every term's shares under `choices` [..., decisions]: [..., groups]."""
        assert self.sharing is not None
        group, factor = np.indices(self.sharing.shape)
        return shares[group, factor, choices[..., self.sharing]].prod(axis=-1)

    def expected(self, probabilities: jax.Array) -> jax.Array:
        """The mean cost under independent `probabilities` [decisions, max_options]."""
        p, q = probabilities[self.first], probabilities[self.second]
        options = np.arange(self.table.shape[-1])
        diagonal = jnp.sum(p * jnp.asarray(self.table[:, options, options], jnp.float32), axis=-1)
        apart = jnp.einsum("gi,gij,gj->g", p, jnp.asarray(self.table, jnp.float32), q)
        terms = jnp.where(self.first == self.second, diagonal, apart)
        if self.shares is not None:
            share = jnp.asarray(self.shares, jnp.float32)
            terms *= jnp.prod(jnp.sum(share * probabilities[self.sharing], axis=-1), axis=-1)
        return self.fixed + jnp.sum(terms)

    def known_expected(self, probabilities: np.ndarray) -> float:
        """As `expected`, of known probabilities in float64."""
        first, second = probabilities[self.first], probabilities[self.second]
        joint = first[:, :, None] * second[:, None, :]
        tied = self.first == self.second
        joint[tied] = first[tied][:, :, None] * np.eye(joint.shape[-1])
        terms = np.sum(joint * self.table, axis=(1, 2))
        if self.shares is not None:
            terms = terms * (self.shares * probabilities[self.sharing]).sum(-1).prod(-1)
        return self.fixed + float(terms.sum())

    @property
    def pairs(self) -> np.ndarray:
        """[groups, max_options, max_options], bool: the options a group can take together."""
        usable = self.mask[self.first][:, :, None] & self.mask[self.second][:, None, :]
        tied = (self.first == self.second)[:, None, None]
        return usable & (~tied | np.eye(self.table.shape[-1], dtype=bool))

    def _usable(self, otherwise: float) -> np.ndarray:
        """The table, with `otherwise` where options cannot be taken together."""
        return np.where(self.pairs, self.table, otherwise)

    @property
    def range(self) -> tuple[float, float]:
        """The costs of the cheapest and the dearest point of the space."""
        if self.shares is not None:
            low, high = self.of_many(np.stack([self._extreme(1), self._extreme(-1)]))
            return float(low), float(high)
        cheapest = self._usable(np.inf).min(axis=(1, 2)).sum()
        dearest = self._usable(-np.inf).max(axis=(1, 2)).sum()
        return self.fixed + float(cheapest), self.fixed + float(dearest)

    @property
    def dearest(self) -> np.ndarray:
        """The point that costs most; of equal ones that of the first options: int [decisions]."""
        if self.shares is not None:
            return self._extreme(-1)
        choices = np.zeros(len(self.mask), int)
        for table, first, second in zip(self._usable(-np.inf), self.first, self.second):
            choices[first], choices[second] = np.unravel_index(np.argmax(table), table.shape)
        return choices

    def _extreme(self, sign: int) -> np.ndarray:
        """The cheapest point (1) or the dearest (-1), by one decision after another.

        Shares and bits rise together in all terms, so that no decision's best option depends on the
        others; a second round would find out.
        """
        point = np.zeros(len(self.mask), int)
        for _ in range(10):
            before = point.copy()
            for decision, exists in enumerate(self.mask):
                points = np.tile(point, (int(exists.sum()), 1))
                points[:, decision] = np.flatnonzero(exists)
                point = points[np.argmin(sign * self.of_many(points))]
            if np.array_equal(point, before):
                break
        return point

    def check_target(self, target: float) -> None:
        """Raises SpaceError if no point of the space can cost `target`, up to rounding."""
        low, high = self.range
        slack = 1e-9 * high  # a target computed as a sum in another order than the range
        if not low - slack <= target <= high + slack:
            raise SpaceError(
                f"The cost target {target:.6g} is outside of the space: its points cost between"
                f" {low:.6g} and {high:.6g}."
            )
