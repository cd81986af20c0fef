"""``python -m rosakit.cli``."""

from rosakit.cli import main

main()
