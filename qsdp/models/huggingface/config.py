"""The config.json of a Hugging Face checkpoint, as the size of a model of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsdp.models.load_safetensors import read_json_beside
from qsdp.models.registry import families
from qsdp.models.size import ModelSize
from qsdp.models.transformers_form import TransformersForm


def config_from_huggingface(folder: str | Path) -> ModelSize:
    """The size of the checkpoint in ``folder``: a GPTConfig for a GPT-2.

    Its dropout is 0, whatever it was trained with. Raises ValueError when ``folder`` has no
    readable config.json, or one of a model whose function none of ours computes.
    """
    path = Path(folder) / "config.json"
    settings = read_json_beside(path)
    form = _form_of(settings, path)
    try:
        return form.size(settings, path)
    except KeyError as error:
        raise ValueError(
            f"{path} lacks the setting {error.args[0]!r}: choose a complete checkpoint."
        ) from None


def form_of(folder: Path) -> TransformersForm[Any]:
    """How the family of the checkpoint in ``folder`` is kept.

    Raises ValueError when its config.json is missing, or names a family that is not ours.
    """
    path = folder / "config.json"
    return _form_of(read_json_beside(path), path)


def _form_of(settings: dict[str, Any], path: Path) -> TransformersForm[Any]:
    forms = [family.transformers for family in families().values() if family.transformers]
    for form in forms:
        if settings.get("model_type") == form.model_type:
            return form
    known = " or ".join(repr(form.model_type) for form in forms)
    raise ValueError(
        f"{path} describes a model of type {settings.get('model_type')!r}, but only {known} can be "
        "loaded: choose a checkpoint of such a model."
    )
