"""``python -m tools.build_preferences``, in a checkout: the command ``tgdpo build-preferences``."""

from tgdpo.build_preferences import main

if __name__ == "__main__":
    raise SystemExit(main())
