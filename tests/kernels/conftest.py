"""In a process with TRITON_INTERPRET=1 kernels run in Triton's interpreter, which is repaired here:
as it comes, it computes bfloat16 with the bits as integers.
"""

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    importlib.import_module("interpreter.bf16")
