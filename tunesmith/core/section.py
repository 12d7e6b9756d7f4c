"""The base of every configuration section: frozen, no unknown keys, numbers are finite numbers.

A section lives beside what it configures; `tunesmith.config` puts them together and words the errors.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A frozen group of settings; building one with an unknown or ill-typed value raises."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        serialize_by_alias=True,  # a key that Python has a method or a keyword for is called otherwise in the class
        validate_default=True,
    )


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""Several names; one name alone and a YAML list are taken, too."""
