"""``python -m tools.plan``, in a checkout: the command ``tgdpo plan``."""

from tgdpo.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
