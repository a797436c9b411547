"""Our plug-in against the vLLM that is installed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from .engines import HERE, PATIENCE, environment


def ask(vllm_python: str, call: dict[str, object]) -> dict[str, object]:
    done = subprocess.run(
        [vllm_python, str(HERE / "in_vllm.py")],
        input=json.dumps(call) + "\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment(),
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("@"))
    found: dict[str, object] = json.loads(line[1:])
    return found


@pytest.fixture(scope="module")
def contract(vllm_python: str) -> dict[str, object]:
    return ask(vllm_python, {"contract": True})


def test_every_abstract_method_of_vllm_is_written(contract: dict[str, object]) -> None:
    assert contract["left"] == []
    assert set(contract["abstract"]) == {  # type: ignore[call-overload]
        "build_connector_meta",
        "get_num_new_matched_tokens",
        "save_kv_layer",
        "start_load_kv",
        "update_state_after_alloc",
        "wait_for_layer_load",
        "wait_for_save",
    }


def test_no_hook_of_ours_is_one_that_vllm_does_not_call(contract: dict[str, object]) -> None:
    assert contract["unknown"] == []


def test_hooks_take_what_vllm_passes(contract: dict[str, object]) -> None:
    parameters = contract["parameters"]
    assert isinstance(parameters, dict)
    assert {"request_finished", "register_kv_caches", "get_finished"} <= set(parameters)
    for name, (ours, theirs) in parameters.items():
        assert ours == theirs, name


@pytest.mark.real
def test_what_cannot_be_carried_switches_the_plug_in_off_and_wrong_settings_stop_vllm(
    vllm_python: str, model: Path, tmp_path: Path
) -> None:
    found = ask(vllm_python, {"switched": str(tmp_path), "model": str(model)})
    assert found.pop("as it should be") is True
    for name in ("policy fail", "memory"):
        said = found.pop(name)
        assert isinstance(said, str)
        assert said.startswith("UsageError: ")
        assert " Fix: " in said
    assert found == dict.fromkeys(("blocks of 64", "two groups", "overrides", "a store that cannot be"), False)


@pytest.mark.real
def test_a_connector_over_an_engine_in_its_own_process_goes_on_from_its_contexts(
    vllm_python: str, model: Path, tmp_path: Path
) -> None:
    found = ask(vllm_python, {"connected": str(tmp_path), "model": str(model)})
    assert found == {
        "positions": 100,
        "mode": "kv",
        "exactness": "exact",
        "reused": 96,
        "computed": 6 + 3,
        "same": True,
        "pieces": 1,
    }
