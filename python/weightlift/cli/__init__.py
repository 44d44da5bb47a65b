"""The command line: ``weightlift COMMAND``, the same as ``python -m weightlift COMMAND``.

Commands import torch and matplotlib when they need them, so that ``inspect`` starts at once; and
nothing of the command line is in the way of a script that it runs.
"""

__all__ = ["COMMANDS"]

# Each is the function of its name in the module of its name.
COMMANDS = ("inspect", "verify", "convert", "diff", "estimate", "doctor", "bench", "run")
