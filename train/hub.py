"""Pipelines on the hub: only the files that are needed, of one commit, and no code."""

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from defenses.errors import UserError
from train.pipelinefit import KEY, one_line
from train.pipelinefolder import INDEX, STEMS, choose_variant, examine_settings, file_names, weight_patterns

SETTINGS = [INDEX, "*/config.json", "scheduler/scheduler_config.json", "tokenizer*/*.json", "tokenizer*/merges.txt"]


def fetch(source: str, revision: str | None) -> Path:
    """Folder in the cache with a pipeline's configuration, tokenizers and safetensors weights.

    What can be refused by its configuration is refused before the weights are fetched. A commit that is in the cache needs no
    network.

    Args:
        source: hub id, ``owner/name``.
        revision: full commit hash; a branch or a tag may be another model tomorrow.

    Raises:
        UserError: no such folder or hub id, no commit hash, the hub does not answer, or see `pipelinefolder.examine`.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise UserError(
            KEY, f"{source} is no folder", "give a saved diffusers pipeline folder, or a hub id (owner/name)"
        )
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise UserError(
            "model.revision",
            f"{revision or 'null'} does not pin {source}, which is no folder here and would be taken from the hub",
            "give the full commit hash, 40 characters, or a folder",
        )
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=SETTINGS))
        layout = examine_settings(folder, source)
        names = _names(source, revision, folder)
        patterns = []
        for part in STEMS.keys() & layout.classes.keys():
            inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
            patterns += weight_patterns(part, choose_variant(part, inside, source))
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            KEY, f"{source} at {revision[:8]} cannot be fetched: {one_line(error)}", "or give a folder"
        ) from error


def _names(source: str, revision: str, folder: Path) -> list[str]:
    """Files of the commit; without a network those in the cache."""
    try:
        return HfApi().list_repo_files(source, revision=revision)
    except Exception:  # also those of the HTTP library, which are of no common kind
        cached = [f"{part}/{name}" for part in STEMS for name in file_names(folder / part)]
        if not any(name.endswith(".safetensors") for name in cached):
            raise
        return cached
