r"""When does equal quadratic mutual information mean equal kernels? The repaired theorem, checked in integers.

Let :math:`K` and :math:`K'` be symmetric kernel matrices of n samples with the same diagonal. Then
:math:`I_K = I_{K'}` for every labelling with two classes if and only if :math:`K = K'`.

*Proof.* A labelling :math:`s \in \{-1, 1\}^n` has :math:`L = (1 1^\top + s s^\top) / 2`, and :math:`H 1 = 0`, so the
difference of the two is :math:`s^\top M s / 2 n^2` with :math:`M = H (K - K') H`. Let it vanish for every s. With
:math:`s = 1 - 2 e_A`, :math:`e_A` the indicator of a set A, and :math:`M 1 = 0`, it is
:math:`2 e_A^\top M e_A / n^2`. :math:`A = \{k\}` gives :math:`M_{kk} = 0`, then :math:`A = \{k, l\}` gives
:math:`M_{kl} = 0`. So :math:`M = 0`, that is :math:`K_{kl} - K'_{kl} = a_k + a_l` for some a, and the equal diagonals
give :math:`2 a_k = 0`. The converse is clear.

Without the condition on the diagonal exactly the differences :math:`a_k + a_l` stay unseen. :math:`V_{IN}` alone
decides as well; what it does not see without the condition are diagonal differences of trace 0.
"""

from __future__ import annotations

import itertools

import numpy as np
import sympy as sp

from reproductions.harness.errata import Evidence

SIZES = (2, 3, 4, 5, 6)


def labellings(samples: int, most: int | None = None) -> np.ndarray:
    """Every labelling with classes -1 and 1 ``(labellings, samples)``, or those with at most ``most`` samples of -1."""
    signs = np.array(list(itertools.product((1, -1), repeat=samples)))
    return signs if most is None else signs[(signs < 0).sum(axis=1) <= most]


def information(signs: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    r""":math:`2 n^4 I`, an integer for integer kernels: :math:`t^\top K t` with :math:`t = n H s`.

    Args:
        signs: Labellings ``(labellings, n)`` of -1 and 1.
        kernels: Symmetric matrices ``(kernels, n, n)``.

    Returns:
        ``(kernels, labellings)``.
    """
    centred = signs.shape[1] * signs - signs.sum(axis=1, keepdims=True)
    return np.einsum("bk,akl,bl->ab", centred, kernels, centred)


def within(signs: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """The potential V_IN times n^2; arguments and result as in :func:`information`."""
    same = signs[:, :, None] == signs[:, None, :]
    return np.einsum("bkl,akl->ab", same.astype(int), kernels)


def differences(samples: int, *, diagonal: bool) -> np.ndarray:
    """A basis of the differences of two kernel matrices ``(unknowns, samples, samples)``."""
    pairs = [(k, l) for k in range(samples) for l in range(k + (not diagonal), samples)]
    basis = np.zeros((len(pairs), samples, samples), dtype=int)
    for number, (k, l) in enumerate(pairs):
        basis[number, k, l] = basis[number, l, k] = 1
    return basis


def rank(values: np.ndarray) -> int:
    """Exact rank of an integer matrix."""
    return int(sp.polys.matrices.DomainMatrix.from_Matrix(sp.Matrix(values)).to_field().rank())


def every_difference(samples: int) -> np.ndarray:
    """Every symmetric matrix of 0 and ±1 with a diagonal of zeros ``(3^pairs, samples, samples)``."""
    basis = differences(samples, diagonal=False)
    entries = np.array(list(itertools.product((-1, 0, 1), repeat=len(basis))))
    return np.einsum("ap,pkl->akl", entries, basis)


def evidence() -> Evidence:
    """Ranks up to six samples, every small difference up to four, and what escapes without the condition."""
    holds, seen = True, {}
    for n in SIZES:
        pairs = n * (n - 1) // 2
        for measure, unseen in ((information, n), (within, n - 1)):
            equal = differences(n, diagonal=False)
            full, few = (rank(measure(labellings(n, most), equal)) for most in (None, 2))
            free = rank(measure(labellings(n), differences(n, diagonal=True)))
            holds &= full == few == pairs and free == pairs + n - unseen
            seen[f"{measure.__name__}, n = {n}"] = f"{full} of {pairs}"
    tried = 0
    for n in (2, 3, 4):
        kernels = every_difference(n)
        equal_everywhere = (information(labellings(n), kernels) == 0).all(axis=1)
        holds &= bool((equal_everywhere == (kernels == 0).all(axis=(1, 2))).all())
        tried += len(kernels)
    escaped = shifted_kernel(4)
    holds &= bool((information(labellings(4), escaped[None]) == 0).all()) and bool((escaped != 0).any())
    return Evidence(
        holds=holds,
        summary=(
            f"The QMI of all labellings has rank {seen['information, n = 6']} in the differences of two kernels of 6 "
            "samples with equal diagonals, likewise for 2 to 5 and for V_IN, and labellings with one or two samples "
            f"against the rest suffice. Of {tried} differences with entries 0 and ±1 none but 0 escapes. With free "
            "diagonals a_k + a_l does."
        ),
        values=seen,
    )


def shifted_kernel(samples: int) -> np.ndarray:
    """A difference that no labelling's QMI sees: :math:`a_k + a_l`."""
    a = np.arange(1, samples + 1)
    return a[:, None] + a[None, :]
