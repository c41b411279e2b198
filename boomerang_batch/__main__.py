"""`python -m boomerang_batch`."""

from boomerang_batch.cli import main

main()
