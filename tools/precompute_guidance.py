"""``python -m tools.precompute_guidance``, in a checkout: the command ``tgdpo guidance``."""

from tgdpo.guidance import main

if __name__ == "__main__":
    main()
