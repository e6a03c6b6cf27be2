"""`python -m unisonde` is the command `unisonde`."""

from unisonde.cli import entry

entry()
