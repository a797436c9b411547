"""What the URL of a store says: its place, and settings such as `budget=20GiB` and `ttl=7d`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from urllib.parse import parse_qsl, unquote, urlsplit

from avp.errors import UsageError

GIB = 2**30
_SIZES: Mapping[str, int] = MappingProxyType({"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40})
_SECONDS: Mapping[str, int] = MappingProxyType({"s": 1, "m": 60, "h": 3600, "d": 86400})


def parse_amount(text: str, *, units: Mapping[str, int]) -> int:
    """A whole number above 0 and one of `units`, multiplied.

    Raises:
        UsageError: it is anything else.
    """
    found = re.fullmatch(r"([0-9]{1,18})([A-Za-z]*)", text)
    if found is None or found[2] not in units or int(found[1]) == 0:
        known = ", ".join(unit for unit in units if unit)
        raise UsageError(f"{text!r} is no amount. Fix: write a whole number above 0 and one of {known}, without space.")
    return int(found[1]) * units[found[2]]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings in a store's URL. Each is read strictly; None where it is not given."""

    url: str
    values: Mapping[str, str]

    @classmethod
    def of(cls, url: str, *, known: Collection[str]) -> Settings:
        """The settings of `url`.

        Raises:
            UsageError: one that is not `known`, is given twice or has no value.
        """
        try:
            pairs = parse_qsl(urlsplit(url).query, keep_blank_values=True, strict_parsing=True, max_num_fields=32)
        except ValueError as error:
            raise UsageError(
                f"the settings of a store's URL cannot be read: {error}. Fix: write ?name=value."
            ) from error
        values = dict(pairs)
        strange = sorted(set(values) - set(known))
        if strange:
            fix = f"use only {', '.join(sorted(known))}" if known else "leave it out"
            raise UsageError(f"this store has no setting {strange[0]!r}. Fix: {fix}.")
        if len(values) != len(pairs) or not all(values.values()):
            raise UsageError("a setting in a store's URL is given twice, or empty. Fix: give each once, with a value.")
        return cls(url, MappingProxyType(values))

    @property
    def path(self) -> str:
        """The path of the URL, percent signs undone."""
        return unquote(urlsplit(self.url).path)

    def text(self, name: str) -> str | None:
        """A setting as it was written."""
        return self.values.get(name)

    def size(self, name: str) -> int | None:
        """A setting in bytes: `500MiB`, `20GiB`."""
        return self._amount(name, _SIZES)

    def seconds(self, name: str) -> int | None:
        """A setting in seconds: `90s`, `12h`, `7d`."""
        return self._amount(name, _SECONDS)

    def _amount(self, name: str, units: Mapping[str, int]) -> int | None:
        text = self.values.get(name)
        if text is None:
            return None
        try:
            return parse_amount(text, units=units)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
