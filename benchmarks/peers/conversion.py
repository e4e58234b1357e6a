"""What the peers' converters share: a job from the command line, and the network and the images it is about.

A converter is a module of this directory that the interpreter of its environment runs as
`python -m benchmarks.peers.convert_NAME JOB`, where JOB is a JSON object with `network` (the arguments of
`hosts.build`), `images` (a .npy file, float32 [N, height, width, 3]: examples, on which int8 is calibrated), `format`
and `output`. It writes the file `output` or ends with an error, whose last line says why.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.peers import hosts

# Network, images [N, 3, height, width] and format -> the content of the file.
Converter = Callable[[torch.nn.Module, torch.Tensor, str], bytes]


def main(converter: Converter, fused_attention: bool = True) -> None:
    """Does the job that the command line names; `fused_attention` as for `hosts.build`."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    images = np.load(job["images"], allow_pickle=False)
    network = hosts.build(**job["network"], fused_attention=fused_attention)
    content = converter(network, torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), job["format"])
    with open(job["output"], "wb") as file:
        file.write(content)
