"""`python -m cifar_fast` is the command line."""

from cifar_fast.cli import main_and_exit

if __name__ == "__main__":
    main_and_exit()
