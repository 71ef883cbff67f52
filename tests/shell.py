"""Commands as a shell gives them."""

from textenv.cli import main


def run(capsys, *arguments):
    """``(exit code, what was printed)`` of ``textenv`` with these arguments."""
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr()
