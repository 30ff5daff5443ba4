"""``python -m tools.token_report``, in a checkout: the command ``tgdpo report``."""

from tgdpo.report import main

if __name__ == "__main__":
    raise SystemExit(main())
