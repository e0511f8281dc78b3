"""Files that others may read, where the umask lets them."""

from pathlib import Path


def open_to_umask(folder: Path) -> None:
    """Gives files the mode that the umask has for new ones.

    safetensors makes its files readable by their owner alone, whatever the umask.

    Args:
        folder: A folder; all files in it and below get the mode.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
