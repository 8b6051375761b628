"""The families of models, and their presets by name. No torch here."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from qsdp.common.registered import held_by_registered
from qsdp.common.user_errors import quoted
from qsdp.models.size import ModelSize
from qsdp.models.spec import ModelSpec
from qsdp.models.transformers_form import TransformersForm

# The module that holds a family's FAMILY, a ``ModelSpec``.
FAMILIES = {
    "gpt2": "qsdp.models.gpt2.family",
}
DEFAULT_PRESET = "nano"

_SOME_VOCABULARY = 256


def families() -> dict[str, ModelSpec[Any]]:
    """All families by name.

    Raises ValueError for one that is none, if two have a preset, a class of sizes or a type in the
    transformers library in common, one trains a preset that it does not have, or a preset makes no
    size.
    """
    found: dict[str, ModelSpec[Any]] = {}
    owners: dict[tuple[str, object], str] = {}
    for name, module in FAMILIES.items():
        family: ModelSpec[Any] = held_by_registered(module, "FAMILY")
        if not isinstance(family, ModelSpec):
            raise ValueError(
                f"FAMILY in {module} is {family!r}: let it be an object of a class that derives "
                "from ModelSpec."
            )
        for needed in ("sizes", "presets"):
            if not hasattr(family, needed):
                raise ValueError(
                    f"the family {name} has no {needed}: give it some, as ModelSpec says."
                )
        own: list[tuple[str, object]] = [("sizes", family.sizes)]
        own += [("preset", preset) for preset in family.presets]
        if family.transformers is not None:
            own.append(("model_type", family.transformers.model_type))
        for each in own:
            if owners.setdefault(each, name) != name:
                raise ValueError(
                    f"the families {owners[each]} and {name} both have the {each[0]} {each[1]}: "
                    "give one of them another."
                )
        if strange := family.training.keys() - family.presets.keys():
            raise ValueError(
                f"the family {name} says how {sorted(strange)} are trained, but has no such "
                f"presets: name some of {list(family.presets)}."
            )
        for preset in family.presets:
            _check_preset(name, family, preset)
        found[name] = family
    return found


def _check_preset(name: str, family: ModelSpec[Any], preset: str) -> None:
    """Raise ValueError for a preset that lacks a field, or has one too many."""
    try:
        with suppress(ValueError):  # which tells of a value, and may like another vocabulary
            family.size_of_preset(preset, _SOME_VOCABULARY)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"the preset {preset} of the family {name} makes no {family.sizes.__name__} "
            f"({quoted(error)}): give it all fields that have no default, but vocab_size, and no "
            "others."
        ) from None


def preset_defaults() -> dict[str, dict[str, Any]]:
    """Every preset, in order, with the defaults of training that differ there."""
    return {
        preset: dict(family.training.get(preset, {}))
        for family in families().values()
        for preset in family.presets
    }


def family_of(preset: str) -> ModelSpec[Any]:
    """The family that has ``preset``. Raises ValueError if none has."""
    for family in families().values():
        if preset in family.presets:
            return family
    raise ValueError(
        f"there is no model preset {preset!r}: choose one of {list(preset_defaults())}."
    )


def family_of_size(size: ModelSize) -> ModelSpec[Any]:
    """The family whose sizes are such. Raises ValueError if none has them."""
    for family in families().values():
        if type(size) is family.sizes:
            return family
    raise ValueError(
        f"a {type(size).__name__} is the size of no registered model: choose one of a family in "
        f"{list(FAMILIES)}."
    )


def form_of_size(size: ModelSize) -> TransformersForm[Any]:
    """How the transformers library keeps models of ``size``.

    Raises ValueError if it has none such.
    """
    form = family_of_size(size).transformers
    if form is None:
        raise ValueError(
            f"models of a {type(size).__name__} have no form in the transformers library: keep a "
            "checkpoint or an export of qsdp's own."
        )
    return form
