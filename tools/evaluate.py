"""``python -m tools.evaluate``, in a checkout: the command ``tgdpo evaluate``."""

from tgdpo.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
