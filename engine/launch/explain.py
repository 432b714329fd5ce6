"""What is wrong with a cluster file, as lines that name the place, what was wanted and what was found.

    workers[0].cout: unknown key, did you mean 'count'?
    router.port: wanted an integer from 1 to 65535, found 'abc'

What was wanted is read from the field's own type, so it cannot go out of date.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError

Place = tuple[int | str, ...]


def explain(model: type[BaseModel], error: ValidationError) -> tuple[str, ...]:
    """One line for each mistake, in the order of the model's fields."""
    lines: dict[Place, str] = {}
    for detail in error.errors():
        place = _known_part(model, detail["loc"])
        # A union reports once for each member, and a list with a bad entry is reported as too short as well:
        # the first line for a place, or for one inside it, says all there is to say.
        if not any(said[: len(place)] == place for said in lines):
            lines[place] = _line(model, place, detail["type"], detail["msg"], detail["input"])
    return tuple(lines.values())


def show_place(place: Place) -> str:
    """("workers", 0, "cout") -> "workers[0].cout"."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "the file"


def show(value: object) -> str:
    """What was found, short enough for one line."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 80 else text[:77] + "..."


def _line(model: type[BaseModel], place: Place, kind: str, message: str, found: object) -> str:
    where = show_place(place)
    if kind == "extra_forbidden":
        owner = _annotation(model, place[:-1])
        known = list(owner.model_fields) if isinstance(owner, type) and issubclass(owner, BaseModel) else []
        close = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
        return f"{where}: unknown key, " + (f"did you mean {close[0]!r}?" if close else f"wanted one of {_list(known)}")
    if kind == "missing":
        return f"{where}: wanted {_wanted(model, place)}, found nothing"
    if kind == "value_error":
        # A rule over several keys of a mapping names the key itself, so that its words follow the mapping's place.
        return (f"{where}." if place else "") + message.removeprefix("Value error, ")
    return f"{where}: wanted {_wanted(model, place)}, found {show(found)}"


def _known_part(model: type[BaseModel], place: Place) -> Place:
    """`place` without what pydantic adds for members of unions."""
    for length in range(1, len(place)):
        if _is_union(_annotation(model, place[:length])):
            return place[:length]
    return place


def _annotation(model: type[BaseModel], place: Place) -> Any:
    """The type at `place`; None where the model has nothing there."""
    here: Any = model
    for part in place:
        here = _inside(_bare(here), part)
        if here is None:
            return None
    return _bare(here)


def _inside(here: Any, part: int | str) -> Any:
    if isinstance(here, type) and issubclass(here, BaseModel):
        field = here.model_fields.get(str(part))
        return None if field is None else field.annotation
    if isinstance(part, int) and get_origin(here) in (list, tuple):
        return get_args(here)[0]
    if get_origin(here) is dict:
        return get_args(here)[1]
    return None


def _bare(annotation: Any) -> Any:
    """Without Annotated and without `| None`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if _is_union(annotation):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return _bare(members[0]) if len(members) == 1 else annotation
    return annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _wanted(model: type[BaseModel], place: Place) -> str:
    owner = _annotation(model, place[:-1]) if place else None
    field = owner.model_fields.get(str(place[-1])) if isinstance(owner, type) and issubclass(owner, BaseModel) else None
    return _name(_annotation(model, place), () if field is None else field.metadata)


def _name(annotation: Any, limits: Iterable[Any]) -> str:
    if get_origin(annotation) is Literal:
        return f"one of {_list(get_args(annotation))}"
    if _is_union(annotation):
        *most, last = (_name(member, ()) for member in get_args(annotation))
        return f"{', '.join(most)} or {last}"
    if get_origin(annotation) in (list, tuple):
        return (
            "a list with at least one entry" if any(isinstance(x, annotated_types.MinLen) for x in limits) else "a list"
        )
    if get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "a mapping"
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return plain.get(annotation, "another value") + _range(limits)


def _range(limits: Iterable[Any]) -> str:
    at_least = at_most = above = None
    pattern = ""
    for limit in limits:
        at_least = getattr(limit, "ge", at_least)
        at_most = getattr(limit, "le", at_most)
        above = getattr(limit, "gt", above)
        pattern = getattr(limit, "pattern", None) or pattern
    if pattern:
        return f" matching {pattern}"
    if at_least is not None and at_most is not None:
        return f" from {at_least} to {at_most}"
    if at_least is not None:
        return f" of at least {at_least}"
    return f" above {above}" if above is not None else ""


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
