"""The course's plumbing: what would hide the lesson if it stood in a notebook. Nothing heavy is imported here.

Every notebook, command and test imports this before torch, so that what torch reads from the environment when it is loaded is set here.
"""

import os

# Threads that wait sleep instead of spinning: two programs on the same two cores otherwise slow each other 18 times, now twice.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
if os.environ.get("COURSE_PROFILE") == "laptop":  # as on a machine with AVX2, no more, and no GPU (`make laptop-check`)
    avx2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    os.environ.update(avx2 | {"CUDA_VISIBLE_DEVICES": ""})
