"""Which engine does a worker run? The one its configuration names, with the options given to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from kvrelay.engine.base import Engine


class EngineOptionsError(ValueError):
    """The engine does not take these options; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """An engine and what it is told. `options` are in its own command line syntax."""

    kind: Literal["vllm", "simulated"] = "vllm"
    model: str
    """A folder or a hub's id."""
    served_model_name: str
    options: Sequence[str] = ()


def make_engine(choice: EngineChoice) -> Engine:
    """The engine, not started yet. Raises `EngineOptionsError`."""
    if choice.kind == "simulated":
        return _simulated(choice)
    from kvrelay.engine.vllm import VllmEngine, VllmEngineConfig

    return VllmEngine(
        VllmEngineConfig(model=choice.model, served_model_name=choice.served_model_name, options=choice.options)
    )


def _simulated(choice: EngineChoice) -> Engine:
    from kvrelay.engine.simulated import SimulatedEngine
    from kvrelay.engine.simulated_model import SimulatedConfig

    types = {field.name: field.type for field in fields(SimulatedConfig)}
    values: dict[str, str | int | float] = {"model": choice.served_model_name}
    words = list(choice.options)
    while words:
        word = words.pop(0)
        name, separator, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in types or not (separator or words):
            known = ", ".join("--" + name.replace("_", "-") for name in types)
            raise EngineOptionsError(f"the simulated engine does not take {word}; it takes {known}, each with a value")
        text = text if separator else words.pop(0)
        convert = {"int": int, "float": float, "str": str}[str(types[name])]
        try:
            values[name] = convert(text)
        except ValueError:
            raise EngineOptionsError(f"--{name.replace('_', '-')} takes {types[name]}, not {text}") from None
    try:
        return SimulatedEngine(SimulatedConfig(**values))  # type: ignore[arg-type]
    except ValueError as error:
        raise EngineOptionsError(str(error)) from error
