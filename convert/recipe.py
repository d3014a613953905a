"""A recipe: one TOML file that says everything about a conversion. Unknown keys are errors; nothing is inherited.

Each table is the config object of the command of that name, so a recipe and the command line cannot drift apart.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lcconvert.convert.extend_config import ExtendConfig
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.convert.settings import make_config
from lcconvert.convert.validate_config import ValidateConfig
from lcconvert.runtime.errors import UserError


class ServeCheck(BaseModel):
    """After conversion the artifact is served over HTTP once and asked `question`; the answer is recorded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    max_tokens: int = Field(48, ge=1)


class Recipe(BaseModel):
    """`source` is what every command takes as SRC; without a [serve] table nothing is served.

    [validate] runs on the source, the extended and the quantized checkpoint, so that the loss of each step shows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: str
    extend: ExtendConfig
    quantize: QuantizeConfig
    validation: ValidateConfig = Field(alias="validate")
    serve: ServeCheck | None = None


_TABLES: dict[str, type[BaseModel]] = {
    "extend": ExtendConfig,
    "quantize": QuantizeConfig,
    "validate": ValidateConfig,
    "serve": ServeCheck,
}


def shipped() -> list[str]:
    """Names of the recipes in the package."""
    folder = resources.files("lcconvert.recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """Reads a .toml path or the name of a shipped recipe; UserError names the file and the key at fault."""
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"recipe {name} does not exist; give a .toml file or one of {', '.join(shipped())}")
        text = path.read_text(encoding="utf-8")
    elif name in shipped():
        text = (resources.files("lcconvert.recipes") / f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise UserError(f"recipe is {name!r}, expected a .toml file or one of {', '.join(shipped())}")
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {name} is not TOML ({error}); correct that line") from None
    for table, kind in _TABLES.items():
        if table in data:
            if not isinstance(data[table], dict):
                raise UserError(f"recipe {name}: {table} is {data[table]!r}, expected a table [{table}]")
            data[table] = make_config(kind, data[table], f"recipe {name}: [{table}]")
    return make_config(Recipe, data, f"recipe {name}")
