"""Hello and Agreement as JSON, read with suspicion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields

from avp.buffers import STORAGE
from avp.errors import UsageError
from avp.handshake import POLICIES, Agreement, CodecOffer, Floor, Hello, Record, Verdict
from avp.identity import identity_from_json, identity_to_json
from avp.manifest import Limits
from avp.segment import Exactness

_LONGEST = 256  # characters of a name, items of a list
_RATES = (1e-9, 1e18)  # what a rate or ratio may be, so that estimates made of it stay finite


def hello_to_json(hello: Hello) -> dict[str, object]:
    """The wire form."""
    value = {field.name: getattr(hello, field.name) for field in fields(hello)}
    return {
        **value,
        "model": None if hello.model is None else identity_to_json(hello.model),
        "codecs": [
            {**asdict(codec), "exactness": codec.exactness.label, "records": [asdict(each) for each in codec.records]}
            for codec in hello.codecs
        ],
        "modes": list(hello.modes),
        "projections": list(hello.projections),
        "transports": list(hello.transports),
        "limits": asdict(hello.limits),
        "floor": asdict(hello.floor),
        "accept": hello.accept.label,
    }


def hello_from_json(value: object, *, limits: Limits) -> Hello:
    """A hello that came over a wire.

    Raises:
        UsageError: a field is missing, unknown or of the wrong type or range; BundleError: the model's are.
    """
    given = _object(value, {field.name for field in fields(Hello)}, "hello")
    model = None if given["model"] is None else identity_from_json(given["model"], max_layers=limits.layers)
    policy, dtype = _name(given, "policy"), _name(given, "dtype")
    if policy not in POLICIES or (dtype and dtype not in STORAGE):
        raise _bad("policy or dtype", f"{policy}, {dtype}")
    return Hello(
        agent=_name(given, "agent"),
        model=model,
        engine=_name(given, "engine"),
        dtype=dtype,
        vocabulary=_name(given, "vocabulary"),
        modes=_names(given, "modes"),
        codecs=tuple(_codec(each) for each in _list(given, "codecs")),
        projections=_names(given, "projections"),
        transports=_names(given, "transports"),
        limits=Limits(**{name: _whole(each, name) for name, each in _plain(given, "limits", Limits).items()}),
        page=_whole(given["page"], "page"),
        tenant=_name(given, "tenant"),
        bandwidth=_rate(given, "bandwidth"),
        prefill=_rate(given, "prefill"),
        accept=Exactness.parse(_name(given, "accept")),
        floor=Floor(**{name: _number(each, name) for name, each in _plain(given, "floor", Floor).items()}),
        policy=policy,
        version=_whole(given["version"], "version"),
    )


def agreement_to_json(agreement: Agreement) -> dict[str, object]:
    """The wire form."""
    return {
        "taken": _verdict(agreement.taken),
        "verdicts": [_verdict(each) for each in agreement.verdicts],
        "tokens": agreement.tokens,
        "reasons": list(agreement.reasons),
    }


def _verdict(verdict: Verdict) -> dict[str, object]:
    return {**asdict(verdict), "exactness": verdict.exactness.label}


def _codec(value: object) -> CodecOffer:
    given = _object(value, {field.name for field in fields(CodecOffer)}, "codec")
    records = tuple(
        Record(_name(each, "weights"), *(_number(each[name], name) for name in ("perplexity", "top1", "continuations")))
        for each in (
            _object(item, {field.name for field in fields(Record)}, "record") for item in _list(given, "records")
        )
    )
    ratio = _rate(given, "ratio")
    if ratio is None:
        raise _bad("ratio", ratio)
    return CodecOffer(
        _name(given, "name"), Exactness.parse(_name(given, "exactness")), ratio, _rate(given, "rate"), records
    )


def _bad(name: str, value: object) -> UsageError:
    return UsageError(
        f"the hello's {name} is {str(value)[:80]!r}, which this protocol does not know. "
        "Fix: ask the other end to send a valid hello; `avp hello URL` shows it."
    )


def _object(value: object, names: set[str], what: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or set(value) != names:
        found = sorted(map(str, value)) if isinstance(value, Mapping) else value
        raise _bad(f"{what} with other fields than {', '.join(sorted(names))}", found)
    return value


def _plain(given: Mapping[str, object], name: str, kind: type[Limits] | type[Floor]) -> Mapping[str, object]:
    return _object(given[name], {field.name for field in fields(kind)}, name)


def _list(given: Mapping[str, object], name: str) -> list[object]:
    value = given[name]
    if not isinstance(value, list | tuple) or len(value) > _LONGEST:
        raise _bad(name, value)
    return list(value)


def _name(given: Mapping[str, object], name: str) -> str:
    value = given[name]
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise _bad(name, value)
    return value


def _names(given: Mapping[str, object], name: str) -> tuple[str, ...]:
    return tuple(_name({name: each}, name) for each in _list(given, name))


def _whole(value: object, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _bad(name, value)
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _RATES[1]:
        raise _bad(name, value)
    return float(value)


def _rate(given: Mapping[str, object], name: str) -> float | None:
    value = None if given[name] is None else _number(given[name], name)
    if value is not None and not _RATES[0] <= value <= _RATES[1]:
        raise _bad(name, value)
    return value
