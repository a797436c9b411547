"""What the two sides of the plug-in tell each other, and what an operator and a request may ask of it.

The side in vLLM's scheduler decides, the side in its worker copies. They may be two processes: all they share are these
values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from avp.errors import UsageError
from avp.security import Tenant
from avp.segment import Exactness

ENGINE = "vllm"
FIELD = "avp"  # what is ours in a request's kv_transfer_params, and in an answer's
_SAVES = ("all", "prompt", "nothing")


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """`kv_connector_extra_config`.

    store: URL of the store. tenant, secret: whose segments; `secret_env` names a variable of the environment instead.
    accept: "exact", or "bounded" for KV of other engines too. save: "all", "prompt" or "nothing". checkpoint: folder of
    the weights, where vLLM was given a name.
    """

    store: str
    tenant: Tenant
    accept: Exactness
    save: str
    checkpoint: str | None

    @classmethod
    def of(cls, config: Mapping[str, object]) -> PluginSettings:
        """Read strictly.

        Raises:
            UsageError: a setting that is unknown or wrong; the message names it.
        """
        strange = sorted(set(config) - {"store", "tenant", "secret", "secret_env", "accept", "save", "checkpoint"})
        wrong = sorted(name for name, value in config.items() if not isinstance(value, str))
        if strange or wrong:
            raise UsageError(
                f"kv_connector_extra_config has {', '.join(strange or wrong)}, which AVP's plug-in does not know or "
                "which is no string. Fix: use store, tenant, secret or secret_env, accept, save, checkpoint."
            )
        values = {name: str(value) for name, value in config.items()}
        store = values.get("store", "disk:")
        if store.lower().startswith("memory:"):
            raise UsageError(
                "a memory: store ends with its process, and vLLM's two sides would each have their own. "
                "Fix: set store to disk:, redis://… or s3://…"
            )
        accept = Exactness.parse(values.get("accept", "exact"))
        if accept > Exactness.BOUNDED:
            raise UsageError(f"accept is {accept.label!r}. Fix: use exact, or bounded for KV of other engines too.")
        save = values.get("save", "all")
        if save not in _SAVES:
            raise UsageError(f"save is {save!r}. Fix: use one of {', '.join(_SAVES)}.")
        tenant = Tenant.named(values.get("tenant", ""), secret=_secret(values))
        return cls(store, tenant, accept, save, values.get("checkpoint"))


def _secret(values: Mapping[str, str]) -> bytes:
    name = values.get("secret_env")
    if name is None:
        return values.get("secret", "").encode()
    if "secret" in values or not os.environ.get(name):
        raise UsageError(
            f"secret_env names {name}, which is not set, or secret is given too. Fix: set the variable, and only it."
        )
    return os.environ[name].encode()


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks in `kv_transfer_params["avp"]`.

    handle: load up to this page, and no further. pages: load the longest beginning of the prompt that is among these.
    wait: answer when what was computed is in the store. tail: keep the prompt's last page too, which is not full.
    """

    handle: str | None = None
    pages: frozenset[str] | None = None
    wait: bool = False
    tail: bool = False

    @classmethod
    def of(cls, params: Mapping[str, object] | None) -> Asked:
        """Read strictly.

        Raises:
            UsageError: a field that is unknown or wrong.
        """
        given = (params or {}).get(FIELD, {})
        if not isinstance(given, Mapping) or not set(given) <= {"handle", "pages", "wait", "tail"}:
            raise UsageError(
                'kv_transfer_params["avp"] may hold handle, pages, wait and tail. Fix: leave the rest out.'
            )
        handle, pages = given.get("handle"), given.get("pages")
        wait, tail = given.get("wait", False), given.get("tail", False)
        good = isinstance(wait, bool) and isinstance(tail, bool) and (handle is None or isinstance(handle, str))
        if not good or not (
            pages is None or (isinstance(pages, list) and all(isinstance(each, str) for each in pages))
        ):
            raise UsageError(
                'kv_transfer_params["avp"] is of the wrong types. Fix: handle is a string, pages a list of strings, '
                "wait and tail are true or false."
            )
        return cls(handle, None if pages is None else frozenset(pages), wait, tail)


@dataclass(frozen=True, slots=True)
class Load:
    """Pages to copy from the store into blocks. The first `exact` of them are wanted `exact`, the rest `bounded`."""

    request: str
    pages: tuple[str, ...]
    blocks: tuple[int, ...]
    exact: int


@dataclass(frozen=True, slots=True)
class Save:
    """A segment to copy out of blocks into the store; its last page may be short."""

    start: int
    tokens: tuple[int, ...]
    parent: str
    pages: tuple[str, ...]
    blocks: tuple[int, ...]
    exactness: Exactness
    wait: bool


@dataclass(frozen=True, slots=True)
class Jobs:
    """The work of one step. `idle`: the step computes nothing, so that it may wait for loads."""

    loads: tuple[Load, ...] = ()
    saves: tuple[Save, ...] = ()
    idle: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What became of earlier work: pages that are in the store now, pages that are not, and pages that could not be
    loaded.
    """

    saved: frozenset[str] = frozenset()
    unsaved: frozenset[str] = frozenset()
    unloaded: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.saved or self.unsaved or self.unloaded)

    def __or__(self, other: Report) -> Report:
        return Report(self.saved | other.saved, self.unsaved | other.unsaved, self.unloaded | other.unloaded)
