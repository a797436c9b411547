"""Who calls, and whose state it is."""

from __future__ import annotations

import pytest

from avp.errors import AccessDenied
from avp.security import Caller, Security, Tenant
from avp.testing import synthetic_context

ANNA = Tenant.named("anna", secret=b"s")
TOKENS = Security(tokens={"t-anna": ANNA, "t-bert": Tenant.named("bert"), "grüße": Tenant.named("cleo")})


def test_a_token_names_its_tenant() -> None:
    assert TOKENS.tenant("t-anna") is ANNA
    assert TOKENS.tenant("grüße").name == "cleo"
    assert TOKENS.authenticates


@pytest.mark.parametrize("token", [None, "", "t-ann", "t-annaa", "T-ANNA", "\udcff", "\0"])
def test_any_other_token_is_denied_and_not_repeated(token: str | None) -> None:
    with pytest.raises(AccessDenied, match="AVP_TOKEN") as caught:
        TOKENS.tenant(token)
    assert "anna" not in str(caught.value)
    assert not token or token not in str(caught.value)


def test_an_empty_token_opens_nothing_even_where_a_server_was_given_one() -> None:
    for token in (None, ""):
        with pytest.raises(AccessDenied):
            Security(tokens={"": ANNA}).tenant(token)


def test_without_tokens_everybody_is_the_nameless_tenant() -> None:
    assert Security().tenant("whatever") == Tenant() == Caller().tenant
    assert not Security().authenticates


def test_a_tenants_salt_is_equal_wherever_name_and_secret_are() -> None:
    assert Tenant.named("anna", secret=b"s") == ANNA
    others = [Tenant.named("anna"), Tenant.named("anna", secret=b"t"), Tenant.named("bert", secret=b"s")]
    assert len({ANNA.salt, *(other.salt for other in others)}) == 4
    assert Tenant.named("", secret=b"s") == Tenant()


def test_no_secret_is_shown() -> None:
    shown = repr(Security(token="t-own", tokens={"t-anna": ANNA})) + repr(ANNA)
    assert "t-own" not in shown
    assert "t-anna" not in shown
    assert "salt" not in shown
    assert synthetic_context().segments[0].pages[0] not in shown
