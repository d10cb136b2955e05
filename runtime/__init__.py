"""What is not diffusion. Importing it says how PyTorch's threads wait, before torch loads them.

At the end of every parallel loop, threads wait for the last one. GNU's OpenMP, which PyTorch uses
on Linux, lets them spin 300,000 times first. On a machine that also does other work they spin in
the time that the last one needs.
"""

import os

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
