"""As `neo-megatron follow`, from a checkout."""

from neo_megatron.cli.entry import run_command

if __name__ == "__main__":
    run_command("follow")
