"""Removing inputs of a linear one after the other, the rest making up for each: the order, and what
every number of them costs.

References: OSSCAR (arXiv 2403.12983) and Týr-the-Pruner (arXiv 2503.09657).

Glossary (consumer y = W x + b)
    moment H    (in, in) second moment of the inputs, centred where a bias may follow, plus a ridge
                λ I: the ridge is on the change of W
    group       inputs that leave together: one channel, or all dimensions of a head
    removed P, kept K, V = H⁻¹ and S = WᵀW as the removals so far have left them
Equations
    refit       W'_K = W_K + W_P H_PK H_KK⁻¹, the best consumer of what is left; as a step: W ← W −
                W_P s with s = V_PP⁻¹ V_P
    price       tr(W_P V_PP⁻¹ W_Pᵀ) = tr(V_PP⁻¹ S_PP), what removing P adds to the error tr(D H Dᵀ),
                D = W − W', of the refit: one elimination is the exact curve of all widths
    step        with V_PP = L Lᵀ, t = L⁻¹ V_P and c = L⁻¹ S_P − ½ (L⁻¹ S_PP L⁻ᵀ) t:  V ← V − tᵀ t,
                S ← S − tᵀ c − cᵀ t
    panel       the next prices ask for the diagonal blocks of V and S alone, the next step for one
                more row of blocks. Those are brought up to date at once; the rest waits until p =
                PANEL inputs have left and is then one product of matrices. With T and C (p, in) the
                rows t and c of the panel,  V now = V − Tᵀ T  and  S now = S − [T; C]ᵀ [C; T]
    cost        O(in³) for all removals: 2 p · in for the row that a step asks for, and in² · p for
                the products that close a panel
    in order    with H = U Uᵀ, U upper triangular, inputs in the order in which they leave: the
                price of the i-th is ‖(W U)_i‖²
"""

import torch
from torch import Tensor

from compressor import linalg
from compressor.errors import NumericalError

PANEL = 64  # inputs that leave before all of both matrices is brought up to date
PACKED = 0.8  # share of what was there that is left when the matrices are made smaller
WHAT = "the moment of the inputs that may leave"


def eliminate(
    weight: Tensor, moment: Tensor, size: int = 1, order: Tensor | None = None, what: str = WHAT
) -> tuple[Tensor, Tensor]:
    """Order groups of `size` consecutive inputs by removal, and price each removal.

    Args:
        weight: W (out, in), float64.
        moment: H (in, in), positive definite, float64.
        size: inputs of a group.
        order: a given order of the groups (groups,), or None for the cheapest first.
        what: the moment, for messages.

    Returns:
        The order, and the error of the refit after each removal, both (groups,). The last group is
        never asked for, but has its place.

    Raises:
        NumericalError: the moment is not positive definite; names `what` and the option 'ridge'.
    """
    if order is None:
        order, costs = remove_greedily(weight, moment, size, what=what)
        return order, costs.clamp(min=0).cumsum(0)
    places = places_of(order, size).flip(0)
    factor = linalg.cholesky(
        moment[places][:, places], what, "ridge"
    )  # U, its rows and columns flipped
    costs = (weight[:, places] @ factor).square().sum(0).flip(0)
    return order, costs.unflatten(0, (len(order), size)).sum(1).cumsum(0)


def remove_greedily(
    weight: Tensor, moment: Tensor, size: int = 1, count: int | None = None, what: str = WHAT
) -> tuple[Tensor, Tensor]:
    """Order groups greedily by marginal cost, the first `count` to leave or all.

    Args as of `eliminate`. Returns the order and the costs, each (count,).
    """
    with torch.inference_mode():  # most steps are short: it makes them a third shorter
        state = (Singles if size == 1 else Elimination)(weight, moment, size, what)
        found = [state.cheapest()]
        while len(found) < (len(moment) // size if count is None else count):
            state.remove()
            found.append(state.cheapest())
    names, costs = zip(*found, strict=True)
    return torch.tensor(names, device=weight.device), torch.tensor(
        costs, dtype=weight.dtype, device=weight.device
    )


class Elimination:
    """V and S, both (n, n), as groups leave: only their diagonal blocks are always up to date."""

    def __init__(self, weight: Tensor, moment: Tensor, size: int, what: str):
        self.size, self.what = size, what
        self.names, self.gone = list(range(len(moment) // size)), list[int]()
        self.panel = max(
            1, PANEL // size
        )  # groups that leave before V and S are brought up to date
        self.count = 0  # those that did
        self.inverse = torch.cholesky_inverse(linalg.cholesky(moment, what, "ridge"))  # V
        self.products = weight.T @ weight  # S
        self.inverses = diagonal_blocks(self.inverse, size)  # these two are always up to date
        self.squares = diagonal_blocks(self.products, size)
        self.open()

    def open(self) -> None:
        """Open an empty panel: t, c and t again of all inputs that leave in it, zero before."""
        height = self.panel * self.size
        self.stack = self.inverse.new_zeros(3 * height, len(self.inverse))
        self.lines = self.stack.unbind()
        self.down, self.across = (
            self.stack[: 2 * height].T,
            self.stack[height:],
        )  # S − their product is up to date
        self.turned = self.across.T
        self.first = self.stack[:height].T  # V − its product with its transpose is up to date

    def cheapest(self) -> tuple[int, float]:
        """Find the group to leave next; return its name and its price."""
        prices = torch.linalg.solve(self.inverses, self.squares).diagonal(dim1=1, dim2=2).sum(1)
        prices[self.gone] = torch.inf
        return self.choose(prices)

    def choose(self, prices: Tensor) -> tuple[int, float]:
        self.chosen = int(prices.argmin())
        self.price = prices[self.chosen].item()
        return self.names[self.chosen], self.price

    def remove(self) -> None:
        """Remove the group that was found: one row of blocks of V and S, and all diagonal ones."""
        inside = slice(self.chosen * self.size, (self.chosen + 1) * self.size)
        row = self.inverse[inside] - self.first[inside] @ self.first.T
        root = linalg.cholesky(row[:, inside], self.what, "ridge")
        row = torch.linalg.solve_triangular(root, row, upper=False)
        half = torch.linalg.solve_triangular(
            root, self.products[inside] - self.down[inside] @ self.across, upper=False
        )
        half -= torch.linalg.solve_triangular(root, half[:, inside].T, upper=False).T @ row / 2
        self.stack.view(3, self.panel, self.size, -1)[:, self.count] = torch.stack([row, half, row])
        self.inverses -= product_blocks(row, row, self.size)
        change = product_blocks(row, half, self.size)
        self.squares -= change + change.mT
        self.inverses[self.chosen] = torch.eye(self.size).to(
            row
        )  # stays invertible; it is not looked at again
        self.leave()

    def leave(self) -> None:
        self.gone.append(self.chosen)
        self.count += 1
        if self.count == self.panel:
            self.inverse.addmm_(self.first, self.first.T, alpha=-1)
            self.products.addmm_(self.down, self.across, alpha=-1)
            if len(self.gone) >= (1 - PACKED) * len(self.names):
                self.pack()
            self.count = 0
            self.open()

    def pack(self) -> None:
        """Drop what has left from both matrices."""
        left = sorted(set(range(len(self.names))) - set(self.gone))
        groups = torch.tensor(left, dtype=torch.long, device=self.inverse.device)
        places = places_of(groups, self.size)
        self.inverse = self.inverse.index_select(0, places).index_select(1, places)
        self.products = self.products.index_select(0, places).index_select(1, places)
        self.inverses, self.squares = self.inverses[groups], self.squares[groups]
        self.names, self.gone = [self.names[group] for group in left], []


class Singles(Elimination):
    """Elimination of single inputs, in fewer and cheaper operations: on small models these take
    the time.
    """

    def __init__(self, weight: Tensor, moment: Tensor, size: int, what: str):
        super().__init__(weight, moment, size, what)
        self.inverses, self.squares = self.inverses.flatten(), self.squares.flatten()

    def cheapest(self) -> tuple[int, float]:
        return self.choose(self.squares / self.inverses)

    def remove(self) -> None:
        group, inverse = self.chosen, self.inverses[self.chosen]
        row, half, again = self.lines[self.count :: self.panel]
        scale = inverse.item()
        if scale <= 0:
            raise NumericalError(f"{self.what} is not positive definite; raise the option 'ridge'")
        scale, coefficients = (
            scale**-0.5,
            self.down[group].clone(),
        )  # a copy: the new rows are among them
        torch.addmv(
            self.inverse[group],
            self.first,
            coefficients[: self.panel],
            beta=scale,
            alpha=-scale,
            out=row,
        )
        torch.addmv(
            self.products[group], self.turned, coefficients, beta=scale, alpha=-scale, out=half
        )
        half.sub_(row, alpha=self.price / 2)
        again.copy_(row)
        self.inverses.addcmul_(row, row, value=-1)
        self.squares.addcmul_(row, half, value=-2)
        inverse.fill_(1.0)
        self.squares[group].fill_(torch.inf)
        self.leave()


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Copy the diagonal blocks (groups, size, size) of a matrix (in, in)."""
    groups = len(matrix) // size
    return (
        matrix.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
    )


def product_blocks(one: Tensor, two: Tensor, size: int) -> Tensor:
    """Compute the diagonal blocks (groups, size, size) of oneᵀ two, matrices (k, in)."""
    return one.unflatten(1, (-1, size)).permute(1, 2, 0) @ two.unflatten(1, (-1, size)).transpose(
        0, 1
    )


def places_of(order: Tensor, size: int) -> Tensor:
    """List inputs in the order in which their groups leave, (in,)."""
    return (order[:, None] * size + torch.arange(size, device=order.device)).flatten()


def dropped_errors(weight: Tensor, moment: Tensor, order: Tensor, size: int = 1) -> Tensor:
    """Compute tr(W_P H_PP W_Pᵀ) after each group of a given order has left and nothing makes up
    for it, (groups,).
    """
    places = places_of(order, size)
    coupled = (weight.T @ weight * moment)[places][:, places]
    return coupled.cumsum(0).cumsum(1).diagonal()[size - 1 :: size]


def refit(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """Compute W' (out, in), the best consumer of the kept inputs, zero elsewhere.

    Args:
        weight: W (out, in).
        moment: H (in, in).
        kept: (in,) bool.
    """
    factor = torch.linalg.cholesky(moment[kept][:, kept])
    found = torch.zeros_like(weight)
    found[:, kept] = torch.cholesky_solve((weight @ moment[:, kept]).T, factor).T
    return found
