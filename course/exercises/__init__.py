"""The notebooks' exercises, a file for each notebook: `exercises.query(answer)` is the check of 00.1. Cards and stubs are in notebooks/, solutions in
notebooks/solutions/."""

from course.exercises.dpo import brevity_pair, margin, simpo_loss
from course.exercises.lora_injection import lora_forward, lora_parameters, mean_adapter
from course.exercises.quantized_loading import blockwise, levels, megabytes
from course.exercises.sft_with_trl import completion_loss, interval, labels
from course.exercises.start_here import lucky, query, temperature

__all__ = [
    "blockwise",
    "brevity_pair",
    "completion_loss",
    "interval",
    "labels",
    "levels",
    "lora_forward",
    "lora_parameters",
    "lucky",
    "margin",
    "mean_adapter",
    "megabytes",
    "query",
    "simpo_loss",
    "temperature",
]
