"""C3A: every b by b block of the change is circulant (arXiv:2407.19342).

Source of the steps: huggingface/peft, ``src/peft/tuners/c3a/utils.py``, ``BlockCircularConvolution.forward``; the scale is PEFT's
division by the number of inputs.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Given


def changed(given: Given, kernel: Array) -> Array:
    """See `RowMethod.changed`: entry (i, j) of a block is number ``(j - i) mod b`` of its kernel."""
    values = given.scale * given.factors["kernel"]
    places = np.arange(values.shape[-1])
    blocks = values[:, :, (places - places[:, None]) % len(places)]
    return np.asarray(kernel + np.swapaxes(blocks, 1, 2).reshape(kernel.shape))


def forward(given: Given, kernel: Array, x: Array) -> Array:
    """See `RowMethod.forward`: a convolution in the frequency domain."""
    values = given.factors["kernel"]
    _, groups, size = values.shape
    frequencies = np.fft.ifft(x.reshape(len(x), groups, size))
    mixed = np.einsum("nes,aes->nas", frequencies, np.fft.fft(values), optimize=True)
    return np.asarray(x @ kernel.T + given.scale * np.fft.fft(mixed).real.reshape(len(x), -1))
