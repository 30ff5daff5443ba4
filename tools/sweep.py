"""``python -m tools.sweep``, in a checkout: the command ``tgdpo sweep``."""

from tgdpo.sweep import main

if __name__ == "__main__":
    main()
