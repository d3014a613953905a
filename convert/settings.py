"""Turns what a person wrote, in a recipe or on the command line, into a frozen config object, or one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lcconvert.runtime.errors import UserError

M = TypeVar("M", bound=BaseModel)


def make_config(kind: type[M], values: Mapping[str, Any], where: str) -> M:
    """An instance of `kind`; None values mean "not given". UserError names the field, the value and what is allowed."""
    given = {key: value for key, value in values.items() if value is not None and value != ()}
    try:
        return kind(**given)
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a typo explains what is missing
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            owner: Any = kind
            known = ", ".join(info.alias or name for name, info in owner.model_fields.items())
            raise UserError(f"{where}: unknown key {field!r}; known keys are {known}") from None
        if first["type"] == "missing":
            raise UserError(f"{where}: {field} is missing; add it") from None
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{where}: {field} is {first['input']!r}; {message}") from None
