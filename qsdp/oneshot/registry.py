"""The solvers that there are, by the names that `--method` takes. No torch here."""

from __future__ import annotations

from qsdp.common.registered import held_by
from qsdp.oneshot.solver import Solver

SOLVERS: dict[str, str] = {
    "magnitude": "qsdp.oneshot.by_magnitude",
}
"""By name the module whose `SOLVER` it is."""

DEFAULT = "magnitude"


def check(method: str) -> None:
    """Raise ValueError for a name that no solver has."""
    if method not in SOLVERS:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(SOLVERS)}")


def solver_of(method: str, *, has_tokens: bool = False) -> Solver:
    """The solver of that name.

    Raises:
        ValueError: If there is none, or it is to work without the calibration tokens that it needs,
            or is given some that it does not use.
    """
    check(method)
    solver = held_by(SOLVERS[method], "SOLVER")
    if not isinstance(solver, Solver):
        raise ValueError(
            f"SOLVER in {SOLVERS[method]} is {solver!r}; let it be a Solver, a ByScore for one"
        )
    if solver.needs_tokens and not has_tokens:
        raise ValueError(
            f"the method {method!r} needs calibration tokens, which no command has; give some to "
            "qsdp.oneshot, or choose another method"
        )
    if has_tokens and not solver.needs_tokens:
        raise ValueError(f"the method {method!r} uses no calibration tokens; give none")
    return solver
