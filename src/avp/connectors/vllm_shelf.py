"""What an engine computed, out of the store that it shares with us; and a context's KV into it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from avp.connectors.chat import Plan
from avp.connectors.vllm_jobs import ENGINE
from avp.context import Context
from avp.delta import Grade, Outline, assemble, store_new
from avp.errors import SegmentMissing
from avp.identity import ModelIdentity
from avp.protocols import Store
from avp.security import Tenant
from avp.segment import PAGE, Exactness, Want, page_ids, root_page, with_salt, worst


@dataclass(frozen=True, slots=True)
class Shelf:
    """A store, and which pages of it are meant."""

    store: Store
    tenant: Tenant
    identity: ModelIdentity
    dtype: str

    def send(self, context: Context | None) -> None:
        """See that the store has a context's KV.

        Raises:
            StoreFailed: it could not be kept.
        """
        if context is not None:
            store_new(self.store, context, self.tenant)

    def context(self, plan: Plan, length: int, *, only_full: bool = False) -> Context:
        """The context of `plan` whose first `length` positions vLLM computed; with `only_full`, as many full pages of
        them as are in the store.

        Raises:
            SegmentMissing: pages are not there that were to be.
        """
        length = length // PAGE * PAGE if only_full else length
        pages = page_ids(root_page(self.identity, salt=self.tenant.salt), plan.ids[:length])
        want = Want(ENGINE, self.dtype, Exactness.BOUNDED)
        here = self.store.have(pages, tenant=self.tenant.name, want=want)
        found = here.index(False) if False in here else len(here)
        if found < len(pages) and not only_full:
            raise SegmentMissing(
                f"of {len(pages)} pages that vLLM computed, the store holds {found}. Fix: give the store that the "
                "server's kv_connector_extra_config names, and let it save there (its log says what went wrong)."
            )
        length = min(length, found * PAGE)
        skeleton = Context("kv", self.identity, plan.ids, length, plan.turns, plan.template)
        outline = Outline(skeleton, pages[:found], (Grade(0, Exactness.BOUNDED, ENGINE, self.dtype),), len(plan.ids))
        whole = assemble(
            outline,
            lambda page, want: self.store.get(page, tenant=self.tenant.name, want=want),
            least=Exactness.BOUNDED,
        )
        segments = with_salt(self.identity, whole.segments, b"")
        return replace(whole, segments=segments, exactness=worst(Want(ENGINE, self.dtype).grade(s) for s in segments))
