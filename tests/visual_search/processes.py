"""What each of several processes runs: a command of flexkit, a few questions at a time.

accelerate launch ... tests/visual_search/processes.py eval visual-search ...
"""

import sys
from functools import partial

from flexkit.__main__ import main
from flexkit.measuring import time_in_turns
from flexkit.visual_search import evaluation

QUICK = {"BATCH": 3, "time_in_turns": partial(time_in_turns, repeats=1)}

if __name__ == "__main__":
    vars(evaluation).update(QUICK)
    sys.exit(main(sys.argv[1:]))
