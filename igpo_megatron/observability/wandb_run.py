"""The Weights & Biases run of a run. Only with a key is anything uploaded: metrics and the public configuration."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from igpo_megatron.observability.run_folder import RunFolder, public_config, read_object, write_whole
from igpo_megatron.observability.settings import Track


def start_wandb(folder: Path, config: Track, name: str) -> Any:
    """A wandb run inside the run folder; None where `track.wandb` is off."""
    if config.wandb == "off":
        return None
    # wandb reads these at import: its caches stay in the run folder, and crash reports are not sent.
    for variable, value in {
        "WANDB_DIR": str(folder),
        "WANDB_CACHE_DIR": str(folder / "wandb" / "cache"),
        "WANDB_CONFIG_DIR": str(folder / "wandb" / "config"),
        "WANDB_DATA_DIR": str(folder / "wandb" / "data"),
        "WANDB_ERROR_REPORTING": "false",
    }.items():
        os.environ[variable] = value
    import wandb

    online = config.wandb == "online" and bool(os.environ.get("WANDB_API_KEY"))
    id_file = folder / "wandb" / "run_id"
    if not id_file.exists():
        write_whole(id_file, secrets.token_hex(4))
    resolved = RunFolder(folder).config
    return wandb.init(
        project=config.project,
        name=name,
        id=id_file.read_text(),
        resume="allow" if online else None,
        dir=folder,
        mode="online" if online else "offline",
        config=public_config(read_object(resolved, "remove it")) if resolved.exists() else None,
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
    )
