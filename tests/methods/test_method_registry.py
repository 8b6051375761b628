"""What a registered method must be, and how it is said of one that is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qsdp.commands.parsing import parse
from qsdp.common.user_errors import UserError
from qsdp.methods import registry
from qsdp.methods.method import Method
from qsdp.train.config import setting_types
from qsdp.train.config_file import file_types

CACHES = (registry.method_classes, setting_types, file_types)


def forget() -> None:
    for cached in CACHES:
        cached.cache_clear()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registries are read anew here, and again afterwards."""
    forget()
    yield
    monkeypatch.undo()
    forget()


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    KEY = "toy"
    toy: bool = False
    toy_rates: tuple[float, ...] | None = None
    toy_steps: tuple[int, ...] = (3, 4)
    toy_names: tuple[str, ...] = ("a",)
    toy_note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Unnamed(Toy):
    rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class OtherKey(Toy):
    KEY = "toys"


@dataclass(frozen=True, kw_only=True)
class WithoutDefault(Toy):
    toy_rate: float


@dataclass(frozen=True, kw_only=True)
class WithList(Toy):
    toy_rate: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class OddType(Toy):
    toy_path: Path = Path()


class Bare(Method):
    KEY = "toy"


class Twin(Toy):
    FOLDERS = ("dense-twin",)


class Checkpoints(Toy):
    FOLDERS = ("mine", "checkpoints")


def register(monkeypatch: pytest.MonkeyPatch, **module: Any) -> None:
    monkeypatch.setitem(sys.modules, "toy_flags", SimpleNamespace(**module))
    monkeypatch.setitem(registry.METHODS, "toy", "toy_flags")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ({}, r"toy_flags is registered, but has no METHOD: let it end with METHOD = \.\.\., as"),
        ({"METHOD": Toy()}, r"METHOD in toy_flags is Toy\(.*: let it be the class of"),
        ({"METHOD": dict}, "METHOD in toy_flags is <class 'dict'>: let it be the class of"),
        ({"METHOD": Unnamed}, "'toy' has KEY 'toy' and the fields toy, .*, rate: name its fields"),
        ({"METHOD": OtherKey}, "'toy' has KEY 'toys' and the fields toy, .*, and its KEY 'toy'"),
        ({"METHOD": Bare}, "'toy' has KEY 'toy' and the fields of no dataclass: name its fields"),
        ({"METHOD": WithoutDefault}, "'toy' has no default for toy_rate, which every run has:"),
        ({"METHOD": WithList}, "'toy' has no default for toy_rate, which every run has: give"),
        ({"METHOD": OddType}, r"toy_path is a <class 'pathlib\.Path'>, which no file of settings"),
        ({"METHOD": Twin}, "'toy' keeps models in 'dense-twin', which is the folder of others"),
        ({"METHOD": Checkpoints}, "'toy' keeps models in 'checkpoints', which is the folder of"),
    ],
)
def test_a_method_that_is_none_is_refused_before_torch_is_loaded(
    monkeypatch: pytest.MonkeyPatch, module: dict[str, Any], said: str
) -> None:
    register(monkeypatch, **module)
    with pytest.raises(ValueError, match=said):
        parse([])


def test_flags_of_every_type_come_back_from_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    register(monkeypatch, METHOD=Toy)
    given = ["--toy-rates", "0.5,2", "--toy-steps", "7", "--toy-names", "b,c", "--toy-note", "é"]
    config = parse(["--toy", *given])
    told = config.settings()
    assert (told["toy_rates"], told["toy_steps"]) == ((0.5, 2.0), (7,))
    assert (told["toy_names"], told["toy_note"]) == (("b", "c"), "é")
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert parse(["--config", str(file)]) == config.changed(out=str(config.out_dir))


def test_a_file_where_a_method_keeps_models_is_said(tmp_path: Path) -> None:
    (tmp_path / "dense-twin").touch()
    with pytest.raises(UserError, match="holds a file named dense-twin, where a folder is to be"):
        parse(["--out", str(tmp_path)])
