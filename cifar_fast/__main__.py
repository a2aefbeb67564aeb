"""`python -m cifar_fast` is the command line."""

from cifar_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
