"""Registry of decompositions by name."""

from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from compressor.errors import ConfigError, did_you_mean
from compressor.methods.base import Method

METHODS: dict[str, type[Method]] = {}


AnyMethod = TypeVar("AnyMethod", bound=Method)


def register(method: type[AnyMethod]) -> type[AnyMethod]:
    """Class decorator: make a method available to recipes under its `name`."""
    if method.name in METHODS:
        raise ValueError(f"two methods are called {method.name!r}")
    METHODS[method.name] = method
    return method


def build(name: str, options: dict[str, Any]) -> Method:
    """Construct a method from recipe options. Raises ConfigError naming the nearest method or
    option, or the bad value.
    """
    if name not in METHODS:
        raise ConfigError(f"method '{name}' does not exist; {did_you_mean(name, METHODS)}")
    valid = [field.name for field in fields(METHODS[name])]
    for key in options:
        if key not in valid:
            raise ConfigError(
                f"method '{name}' has no option '{key}'; "
                f"{did_you_mean(key, valid) if valid else 'it has none'}"
            )
    try:
        return TypeAdapter(METHODS[name]).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"method '{name}', option '{'.'.join(map(str, first['loc']))}': {first['msg']}"
        ) from None
