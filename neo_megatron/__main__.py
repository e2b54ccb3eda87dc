"""`python -m neo_megatron COMMAND ...`, the same as `neo-megatron COMMAND ...`."""

from neo_megatron.cli.entry import main

if __name__ == "__main__":
    main()
