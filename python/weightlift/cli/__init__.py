"""The command line: ``weightlift COMMAND``, the same as ``python -m weightlift COMMAND``.

Commands import torch and matplotlib only when they need them, so that ``inspect`` starts at once. A
script that ``run`` starts sees nothing of the command line.
"""

__all__ = ["COMMANDS"]

# Each command is a function in the module of the same name.
COMMANDS = ("inspect", "verify", "convert", "diff", "estimate", "doctor", "bench", "run")
