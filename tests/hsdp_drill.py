"""Updates of the tiny model under torchrun on all ranks. Arguments: a folder with the model and its pairs, and whether
the ranks of each agent hold a whole model (`hsdp`) or all ranks together (`line`). Each rank writes its results.
"""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from rank_cases import all_updated, config_of

from dwrl_fast import ranks

CASES: dict[str, dict[str, Any]] = {
    "dwrl": {"method": "dwrl"},
    "bt": {"method": "bt"},
    "dwrl, LoRA": {"method": "dwrl", "use_peft": True},
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, how = Path(sys.argv[1]), sys.argv[2]
    together = ranks.start(300, hsdp=how == "hsdp")
    configs = {name: config_of(folder, learning_rate=1e-3, **case) for name, case in CASES.items()}
    found = {"mesh": tuple(together.mesh.shape), "parts": together.parts, "updates": all_updated(together, configs)}
    (folder / f"{how}-{together.rank}.pkl").write_bytes(pickle.dumps(found))
    together.gather(None)
    os._exit(0)
