import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

from avp.cli import _COMMANDS, cli, main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The `avp` command in a process of its own."""
    code = "from avp.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_help_lists_every_command_with_its_line() -> None:
    shown = CliRunner().invoke(cli, ["--help"])
    assert shown.exit_code == 0
    for name, (_, line) in _COMMANDS.items():
        assert name in shown.stdout
        assert line in shown.stdout


def imported_by(command: list[str], names: set[str]) -> str:
    """Which of the modules a command imports, as a sorted list."""
    report = f"print(sorted({names} & set(sys.modules)), file=sys.stderr)"
    code = f"import sys\nfrom avp.cli import main\ntry: main()\nfinally: {report}"
    return subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True).stderr


def test_help_imports_no_command_and_no_torch() -> None:
    assert imported_by(["--help"], {"torch", "transformers", "rich", "avp.cli.models"}) == "[]\n"


@pytest.mark.parametrize("command", [["models", "list"], ["inspect", "--help"]])
def test_commands_without_a_model_import_no_torch(command: list[str]) -> None:
    assert imported_by(command, {"torch", "transformers"}) == "[]\n"


def test_version_is_that_of_the_package() -> None:
    assert version("avp") in CliRunner().invoke(cli, ["--version"]).stdout


def test_an_unknown_command_is_one_message_and_exit_code_2() -> None:
    done = run("fly")
    assert done.returncode == 2
    assert "No such command 'fly'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_ours_is_its_class_and_message_and_exit_code_2() -> None:
    done = run("models", "remove", "nothing")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ModelNotFound: 'nothing' is not a model that AVP brings.")
    assert "Traceback" not in done.stderr


def test_main_ends_the_process_for_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["avp", "inspect", "/nowhere/at all"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_reader_that_leaves_early_gets_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -c 'from avp.cli import main; main()' models list --json | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "Traceback" not in done.stderr
