"""Reading a request's JSON by hand: what is known and wrong is refused by name, what is unknown is left alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from moe_edge.models.errors import MoeEdgeError

CONTEXT_CODE = "context_length_exceeded"
LONGEST_SHOWN = 60  # characters of a value that a message repeats


class ApiError(MoeEdgeError):
    """An error that goes to the client, never to the command line.

    kind: OpenAI's error type. param: the field that is wrong.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after = retry_after


def parse_json(data: bytes) -> dict[str, Any]:
    """The object of a body. Raises ApiError."""
    try:
        body = json.loads(data, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except (ValueError, UnicodeDecodeError) as e:
        raise ApiError(400, f"the body is not JSON: {shown(str(e))}") from e
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    return body


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def shown(value: Any) -> str:
    """A value as a message repeats it, shortened."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


class Fields:
    """The fields of one JSON object. where: how messages name it, as in `messages[2].`."""

    def __init__(self, values: Any, where: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ApiError(400, f"{where.rstrip('.') or 'the body'} is not an object", param=where.rstrip(".") or None)
        self.values, self.where = values, where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def wrong(self, name: str, needed: str) -> ApiError:
        """The error for a field that is not what is needed."""
        path = self.where + name
        return ApiError(400, f"{path} must be {needed}, not {shown(self.values.get(name))}", param=path)

    def refuse(self, name: str, why: str) -> NoReturn:
        """A value that is known and not supported: raises."""
        path = self.where + name
        raise ApiError(400, f"{path} is not supported: {why}", param=path, code="unsupported_parameter")

    def text(self, name: str, default: str | None = None, *, choices: Sequence[str] = ()) -> str | None:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        _check_text(value, self.where + name)
        if choices and value not in choices:
            raise self.wrong(name, f"one of {', '.join(choices)}")
        return value

    def needed_text(self, name: str) -> str:
        value = self.text(name)
        if value is None:
            raise ApiError(400, f"{self.where}{name} is missing", param=self.where + name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not _between(value, least, most):
            raise self.wrong(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least} to {most}")
        return value

    def object(self, name: str) -> Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self.where}{name}.")

    def items(self, name: str, most: int = 100_000) -> list[Any]:
        """A list; empty when it is missing."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > most:
            raise self.wrong(name, "a list" if not isinstance(value, list) else f"a list of at most {most}")
        return value

    def objects(self, name: str) -> list[Fields]:
        return [Fields(each, f"{self.where}{name}[{at}].") for at, each in enumerate(self.items(name))]

    def texts(self, name: str, most: int = 64) -> tuple[str, ...]:
        """A string or a list of strings; empty ones are left out."""
        value = self.values.get(name)
        if value is None:
            return ()
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or len(found) > most or not all(isinstance(each, str) for each in found):
            raise self.wrong(name, f"a string or a list of at most {most} strings")
        for each in found:
            _check_text(each, self.where + name)
        return tuple(each for each in found if each)


def _between(value: float, least: float, most: float) -> bool:
    try:
        return math.isfinite(value) and least <= value <= most
    except OverflowError:
        return False


def _check_text(text: str, path: str) -> None:
    """A half of a surrogate pair is no text: it could not be sent back."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{path} has half of a surrogate pair in it", param=path) from None
