"""What is not diffusion. Importing it sets how PyTorch's threads wait, before torch loads them.

At the end of every parallel loop, threads wait for the last one. GNU's OpenMP, which PyTorch uses
on Linux, has them turn in a loop 300,000 times before they sleep. On a machine that does other work
too, they turn in the very time that the last one needs. A training step of the demo's size on two
cores, beside 0, 1, 2 and 4 processes that never rest, in steps a second (RESULTS.md):

    300,000 turns        9.8   2.6   1.5   0.5
    3,000 turns         10.0   3.1   3.3   2.1

What the user sets in GOMP_SPINCOUNT or OMP_WAIT_POLICY stays. `python bench/busy.py` prints this
table for the machine that it runs on. Every script imports this package first.
"""

import os

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"
