"""``python -m metagpt_fast`` is ``metagpt-fast``."""

from .cli import main

if __name__ == "__main__":
    main()
