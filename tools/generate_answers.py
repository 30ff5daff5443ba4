"""``python -m tools.generate_answers``, in a checkout: the command ``tgdpo generate``."""

from tgdpo.generate import main

if __name__ == "__main__":
    raise SystemExit(main())
