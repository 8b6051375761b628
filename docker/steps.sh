#!/bin/sh
# The steps that the Dockerfiles run, in one place, so that they can be proven without Docker too.
#
#   steps.sh dependencies   make the virtual environment $VENV with $TORCH and the build tools
#   steps.sh project        install qsdp from the current folder into $VENV, not editable
#
# TORCH holds arguments of `pip install`, so it may name an index as well. `make setup` begins with
# the first of them; PYTHON (python3) makes the environment.
set -eu
: "${VENV:?names the virtual environment to make}"

case "${1:-}" in
dependencies)
    : "${TORCH:?says which torch to install, such as torch==2.13.0}"
    "${PYTHON:-python3}" -m venv "$VENV"
    # shellcheck disable=SC2086
    "$VENV/bin/pip" install $TORCH
    "$VENV/bin/pip" install "scikit-build-core>=1.0" cmake ninja
    ;;
project)
    QSDP_REQUIRE_NATIVE=1 "$VENV/bin/pip" install --no-build-isolation ".[train]"
    "$VENV/bin/pip" uninstall --yes scikit-build-core cmake ninja
    # From elsewhere, so that the installed package is imported and not this folder.
    cd / && "$VENV/bin/python" -c "import qsdp; print('installed', qsdp.__file__)"
    ;;
*)
    echo "usage: steps.sh dependencies|project" >&2
    exit 2
    ;;
esac
