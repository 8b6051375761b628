"""The solvers that there are, by the names that ``--method`` takes. No torch here."""

from __future__ import annotations

from qsdp.common.registered import held_by_registered
from qsdp.common.user_errors import quoted
from qsdp.oneshot.solver import Solver

SOLVERS: dict[str, str] = {
    "magnitude": "qsdp.oneshot.by_magnitude",
}
"""The module whose ``SOLVER`` it is, by name."""

DEFAULT = "magnitude"


def check_solver(method: str) -> None:
    """Raise ValueError for a name that no solver in the registry has."""
    if method not in SOLVERS:
        raise ValueError(f"method is {method!r}: choose one of {', '.join(SOLVERS)}.")


def chosen_method(given: str | None, *, idle: str | None) -> str:
    """The solver that a command chooses of the registry: --method as ``given``, or the default.

    Args:
        given: The name; None where it is unset.
        idle: Where a solver has nothing to do, in words; None where it has something.

    Raises:
        ValueError: No solver has the name, or it is given to do nothing.
    """
    if given is None:
        return DEFAULT
    try:
        check_solver(given)
    except ValueError as error:
        raise ValueError(f"--{quoted(error)}.") from None
    if idle is not None:
        raise ValueError(f"--method {given} has nothing to do {idle}: leave it out.")
    return given


def by_method(method: str | None) -> str:
    """Which solver in the registry compressed a model, for the end of a phrase.

    Nothing where it was the default, or, as with None, nobody.
    """
    return "" if method in (None, DEFAULT) else f" by {method}"


def solver_of(method: str, *, has_tokens: bool = False) -> Solver:
    """The solver of that name in the registry.

    Raises:
        ValueError: There is none, or it is to work without the calibration tokens that it needs,
            or is given some that it does not use.
    """
    check_solver(method)
    solver = held_by_registered(SOLVERS[method], "SOLVER")
    if not isinstance(solver, Solver):
        raise ValueError(
            f"SOLVER in {SOLVERS[method]} is {solver!r}: let it be a Solver, a ByScore for one."
        )
    if solver.needs_tokens and not has_tokens:
        raise ValueError(
            f"the method {method!r} needs calibration tokens, which no command has: give some to "
            "qsdp.oneshot, or choose another method."
        )
    if has_tokens and not solver.needs_tokens:
        raise ValueError(f"the method {method!r} uses no calibration tokens: give none.")
    return solver
