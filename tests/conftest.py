"""Where there is no GPU, Triton's kernels are run by its interpreter.

That is settled when triton is first imported, and peft imports it: so it is said here, before any test is.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
