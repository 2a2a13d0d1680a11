"""A command that must refuse its arguments."""

import pytest


def refused(command, *arguments, capsys) -> str:
    """Its error, which must be one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command.main([str(argument) for argument in arguments])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said
