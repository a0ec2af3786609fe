"""Checking JSON when it is read: the base of every schema, the types that they share, and how files are checked."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from utils.errors import UserError
from utils.storage.reading import read_json

Text = Annotated[str, Field(min_length=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
PlainName = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]  # of a layer; PEFT takes other texts for patterns


class Schema(BaseModel):
    """Every type as written: no text for a number, no truth value for one, no NaN, no field that is not known."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
    what: ClassVar[str] = "file"
    remedy: ClassVar[str] = "restore it or train the checkpoint again"


class Open(Schema):
    """A schema of something that holds more than is read: what else there is differs between versions."""

    model_config = ConfigDict(extra="allow")


def read(path: str | Path, schema: type[BaseModel]) -> Any:
    """The JSON in file `path`, as it stands there. Raises UserError where `schema` does not allow it."""
    return check(read_json(path), schema, path)


def read_foreign(path: str | Path, schema: type[BaseModel]) -> Any:
    """The same of a file of another project, whose JSON may hold Infinity, and a key twice."""
    return check(read_json(path, foreign=True), schema, path)


def check(value: Any, schema: type[BaseModel], path: str | Path) -> Any:
    """`value`, read from `path`, unchanged. Raises UserError where `schema` does not allow it."""
    try:
        schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        problem = f"{place}: {first['msg']}" if place else first["msg"]
        raise UserError(f"{path} is no {schema.what} or is damaged ({problem}); {schema.remedy}") from None
    return value
