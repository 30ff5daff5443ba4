"""``python -m tools.import_llamafactory_config``, in a checkout: the command ``tgdpo import-config``."""

from tgdpo.import_config import main

if __name__ == "__main__":
    raise SystemExit(main())
