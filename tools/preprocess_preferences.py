"""``python -m tools.preprocess_preferences``, in a checkout: the command ``tgdpo preprocess``."""

from tgdpo.preprocess import main

if __name__ == "__main__":
    raise SystemExit(main())
