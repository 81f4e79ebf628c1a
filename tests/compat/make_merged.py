"""Merge checkpoints and write down what each must hold.

``make_merged.py DIR`` makes ``DIR/<case>/<step>`` and ``DIR/<case>.npz``.
"""

import sys
from pathlib import Path

import numpy as np

from lora_merge_cli import MergeOptions, MergeRequest, ScaleOptions, merge, open_checkpoint
from lora_merge_cli.records import full_region

ROOT = Path(__file__).parent.parent.parent
CASES = {
    "pi0_alpha": (ROOT / "tests/golden/pi0_alpha/lora/19999", {"paligemma": 12.0, "action_expert": 2.0}),
    "pi0_fast": (ROOT / "tests/golden/pi0_fast/lora/19999", {"": 4.0}),
    "no_suffix": (ROOT / "sample_checkpoints/pi0_fast_tiny/2999", {}),
}

for name, (checkpoint, alpha) in CASES.items():
    output = Path(sys.argv[1]) / name / checkpoint.name
    merge(MergeRequest(checkpoint, output, options=MergeOptions(ScaleOptions(alpha))))
    source = open_checkpoint(output).source
    arrays = {}
    for path, spec in source.index().tensors.items():
        key = "/".join(map(str, path[1:-1] if path[-1] == "value" else path[1:]))
        arrays[key] = source.read(path, full_region(spec.shape)).astype(np.float32)
        arrays[f"dtype:{key}"] = np.array(spec.dtype.name)
    np.savez(Path(sys.argv[1]) / f"{name}.npz", **arrays)
