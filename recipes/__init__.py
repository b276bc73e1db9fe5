"""Recipes around asymgqa_peft: convert and recover a model, merge, publish, evaluate, draw, benchmark.

From the repository's folder each runs as `python recipes/NAME.py` where the project is installed from there
(`pip install -e .`), and as `python -m recipes.NAME` in any case.
"""

import logging

# Where it is installed, it warns on import of a kernel that it would rather have: who reads that takes it for a fault.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
