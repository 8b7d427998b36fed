"""Settings for all tests: offline, one thread.

No test may use the network: what a test needs it builds, see tests/tiny.py. The variables are set
before anything imports torch or transformers, which read them only once, and are inherited by the
processes that tests start. Nothing heavy is imported here, since tests of the core need none of it.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models are slower on two threads than on one, and on a busy machine ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else a warning for each fork
