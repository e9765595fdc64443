"""``python -m lmrl_env`` is ``lmrl``."""

from lmrl_env.cli import main

if __name__ == "__main__":
    main(prog_name="lmrl")
